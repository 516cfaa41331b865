//! Frames on their way from the device to a reader: a bounded number of bytes, and nobody ever waits for a reader.
//!
//! A watched run is copied to a buffer that the host can map. The buffer stays with the frame until a reader has taken
//! it, so a slow reader holds buffers; where none is left, the frame is dropped and counted. The numbers are read out of
//! the buffer by the reader's own thread. No lock of ours is held while wgpu is called, and what wgpu calls back (on the
//! thread of whoever polls or submits) only marks a frame as ready.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use moewe_plan::{FrameToken, TapFrame};
use wgpu::BufferUsages;

use crate::Gpu;
use crate::frame::Layout;
use crate::memory::Buffer;

/// Smallest buffer, in bytes.
pub(crate) const LEAST: u64 = 4096;

/// A frame that is, or will be, in a buffer.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) number: u64,
    pub(crate) buffer: Buffer,
    pub(crate) layout: Arc<Layout>,
    /// The rows, without their ids.
    pub(crate) tokens: Vec<Option<FrameToken>>,
}

#[derive(Debug)]
struct Pending {
    frame: Frame,
    /// Whether the buffer could be mapped, as soon as that is known.
    mapped: Option<bool>,
}

#[derive(Debug, Default)]
struct State {
    /// Frames of submitted runs, in their order.
    pending: VecDeque<Pending>,
    /// Buffers that wait for a frame.
    free: Vec<Buffer>,
    /// Bytes of all buffers, wherever they are.
    bytes: u64,
    dropped: u64,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    limit: u64,
    state: Mutex<State>,
    /// Told when a frame is ready or the ring is closed.
    ready: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mapped(&self, number: u64, well: bool) {
        let mut state = self.lock();
        if let Some(pending) = state.pending.iter_mut().find(|pending| pending.frame.number == number) {
            pending.mapped = Some(well);
        }
        drop(state);
        self.ready.notify_all();
    }

    fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Reads a frame out of its buffer, which is free then.
    fn read(&self, Pending { frame, mapped }: Pending) -> Option<TapFrame> {
        let Frame { number, buffer, layout, tokens } = frame;
        let read = mapped.unwrap_or(false).then(|| buffer.raw.get_mapped_range(..layout.bytes).ok()).flatten();
        let read = read.map(|bytes| layout.frame(number, &tokens, &bytes));
        buffer.raw.unmap();
        let mut state = self.lock();
        if read.is_some() && !state.closed {
            state.free.push(buffer);
        } else {
            state.bytes -= buffer.bytes();
            state.dropped += u64::from(read.is_none());
            drop(state);
            drop(buffer);
        }
        read
    }
}

impl State {
    /// The next frame if it is known whether it can be read.
    fn pop(&mut self) -> Option<Pending> {
        self.pending.front()?.mapped?;
        self.pending.pop_front()
    }
}

/// The session's end.
#[derive(Debug)]
pub(crate) struct Ring {
    shared: Arc<Shared>,
}

impl Ring {
    /// A ring of at most `limit` bytes. Buffers are made as they are needed.
    pub(crate) fn new(limit: u64) -> Self {
        Self { shared: Arc::new(Shared { limit, state: Mutex::default(), ready: Condvar::new() }) }
    }

    pub(crate) fn receiver(&self) -> FrameReceiver {
        FrameReceiver { shared: Arc::clone(&self.shared) }
    }

    /// A buffer for a frame of so many bytes. Without one, the frame counts as dropped.
    pub(crate) fn buffer(&self, gpu: &Gpu, bytes: u64) -> Option<Buffer> {
        let mut evicted = Vec::new();
        let mut state = self.shared.lock();
        // A buffer that is far too large is left to the frames it was made for.
        let fits = |buffer: &Buffer| (bytes..=bytes.max(LEAST).saturating_mul(4)).contains(&buffer.bytes());
        let best = state.free.iter().enumerate().filter(|(_, buffer)| fits(buffer)).min_by_key(|(_, b)| b.bytes());
        if let Some((index, _)) = best {
            return Some(state.free.swap_remove(index));
        }
        let free: u64 = state.free.iter().map(Buffer::bytes).sum();
        let room = self.shared.limit.saturating_sub(state.bytes - free);
        // Rounded up, so that later frames of about this size can have it too.
        let sizes = [bytes.max(LEAST).checked_next_power_of_two().unwrap_or(u64::MAX), bytes.next_multiple_of(16)];
        let size = sizes.into_iter().find(|size| *size <= room);
        while size.is_some_and(|size| state.bytes + size > self.shared.limit) {
            let Some(buffer) = state.free.pop() else { break };
            state.bytes -= buffer.bytes();
            evicted.push(buffer);
        }
        state.bytes += size.unwrap_or(0);
        drop(state);
        drop(evicted);
        let usage = BufferUsages::COPY_DST | BufferUsages::MAP_READ;
        let limit = gpu.limits.max_buffer_size;
        let made = size.and_then(|size| gpu.buffer_up_to("a frame", size, usage, limit).ok());
        if made.is_none() {
            let mut state = self.shared.lock();
            state.bytes -= size.unwrap_or(0);
            state.dropped += 1;
        }
        made
    }

    /// Takes a frame whose run was submitted, and reads it as soon as the device is done.
    pub(crate) fn submitted(&self, gpu: &Gpu, frame: Frame) {
        let (number, bytes, raw) = (frame.number, frame.layout.bytes, frame.buffer.raw.clone());
        self.shared.lock().pending.push_back(Pending { frame, mapped: None });
        let shared = Arc::clone(&self.shared);
        let map = || raw.map_async(wgpu::MapMode::Read, ..bytes, move |mapped| shared.mapped(number, mapped.is_ok()));
        // A refusal is told to the callback, too.
        let _ = gpu.scoped(map);
    }

    /// Takes back the buffer of a frame whose run was refused.
    pub(crate) fn refused(&self, frame: Frame) {
        let mut state = self.shared.lock();
        state.dropped += 1;
        state.free.push(frame.buffer);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        let free = std::mem::take(&mut state.free);
        // Nobody may poll any more, so what the device has not given back by now is given up.
        let (ready, lost): (VecDeque<Pending>, VecDeque<Pending>) =
            std::mem::take(&mut state.pending).into_iter().partition(|pending| pending.mapped.is_some());
        state.pending = ready;
        state.dropped += lost.len() as u64;
        drop(state);
        drop((free, lost));
        self.shared.ready.notify_all();
    }
}

/// The reader's end of a session's frames, for any thread. All receivers of a session, and [`crate::Session::frames`],
/// take from the same frames: each frame goes to one of them.
///
/// A receiver need not poll the device; the session's own calls see to it that frames become ready, at the latest
/// before [`crate::Session::prefill`], [`crate::Session::decode`] or [`crate::Session::step`] returns. It may be dropped at any time, and may
/// outlive the session.
#[derive(Clone, Debug)]
pub struct FrameReceiver {
    shared: Arc<Shared>,
}

impl FrameReceiver {
    /// The next frame, if one is ready.
    pub fn try_recv(&self) -> Option<TapFrame> {
        loop {
            let frame = self.shared.lock().pop()?;
            // A frame that cannot be read counts as dropped.
            if let Some(frame) = self.shared.read(frame) {
                return Some(frame);
            }
        }
    }

    /// Waits for the next frame; `None` when the session is gone and all its frames were taken.
    pub fn recv(&self) -> Option<TapFrame> {
        let mut state = self.shared.lock();
        loop {
            if let Some(frame) = state.pop() {
                drop(state);
                if let Some(frame) = self.shared.read(frame) {
                    return Some(frame);
                }
                state = self.shared.lock();
            } else if state.closed {
                return None;
            } else {
                state = self.shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Frames of the session that were dropped so far.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped()
    }
}
