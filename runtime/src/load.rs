//! From weight files to device buffers: reading, verifying and copying overlap.
//!
//! Three stages follow one another through the files: one thread waits for the disk, one holds what is there against
//! hashes (on all cores), and the caller's copies what was verified that far into staging memory of the device. No stage
//! runs further than [`LEAD`] ahead of the next one, so that each byte is read from disk once even if the files do not
//! fit into memory. A file's hash is complete only at its end: if it is wrong, what was copied by then is thrown away.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use moewe_plan::{Plan, Shard, Weight, WeightFiles};
use wgpu::BufferUsages;

use crate::memory::Buffer;
use crate::{Error, Gpu, Progress, Result};

/// Bytes handed to the device at once.
const CHUNK: u64 = 8 << 20;
/// Bytes in flight before the upload waits for the device, so that staging memory stays bounded.
const IN_FLIGHT: u64 = 64 << 20;
/// Bytes that a stage may be ahead of the next one.
const LEAD: u64 = 256 << 20;
/// Longest time without news for the caller.
const NEWS: Duration = Duration::from_millis(50);

/// How weights were loaded. The stages overlap: each of their times counts only while that stage was busy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loaded {
    /// Bytes of all weight files, which were read and verified.
    pub file_bytes: u64,
    /// Bytes that were copied to the device.
    pub copied_bytes: u64,
    /// Seconds from begin to end.
    pub seconds: f64,
    /// Seconds of waiting for the disk, or for the system to map what it still had in memory.
    pub read_seconds: f64,
    /// Seconds of hashing.
    pub verify_seconds: f64,
    /// Seconds of copying, with making buffers and waiting for the device.
    pub copy_seconds: f64,
}

impl std::fmt::Display for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rate = |bytes: u64, seconds: f64| bytes as f64 / seconds.max(1e-9) / 1e9;
        write!(
            f,
            "loaded {:.2} GB in {:.2} s: {:.1} GB/s; reading {:.1} GB/s, verifying {:.1}, copying {:.1}",
            self.file_bytes as f64 / 1e9,
            self.seconds,
            rate(self.file_bytes, self.seconds),
            rate(self.file_bytes, self.read_seconds),
            rate(self.file_bytes, self.verify_seconds),
            rate(self.copied_bytes, self.copy_seconds),
        )
    }
}

/// A shard by its weight and its place there.
pub(crate) type ShardId = (u32, u32);

pub(crate) fn shard_of(plan: &Plan, (weight, shard): ShardId) -> (&Weight, &Shard) {
    let weight = &plan.weights[weight as usize];
    (weight, &weight.shards[shard as usize])
}

/// Bytes of the buffer of a shard.
pub(crate) fn padded_bytes(shard: &Shard) -> u64 {
    shard.segments.iter().map(|segment| segment.bytes).sum::<u64>().next_multiple_of(16)
}

/// Makes pipelines and tells of its progress.
pub(crate) type Prepare<'a> = &'a (dyn Fn(&dyn Fn(Progress)) -> Result<()> + Sync);

/// Verifies all weight files and hands shards of them to the device, and lets `prepare` make pipelines meanwhile.
pub(crate) fn load(
    gpu: &Gpu,
    plan: &Plan,
    files: &WeightFiles,
    shards: &BTreeSet<ShardId>,
    prepare: Prepare,
    progress: &dyn Fn(Progress),
) -> Result<(BTreeMap<ShardId, Buffer>, Loaded)> {
    let begin = Instant::now();
    // In the order of the files, since that is how they are verified.
    let mut order: Vec<ShardId> = shards.iter().copied().collect();
    order.sort_by_key(|&id| shard_of(plan, id).1.segments.first().map(|segment| files.position(segment)));
    let total = order.iter().map(|&id| padded_bytes(shard_of(plan, id).1)).sum();
    let stages = Stages { state: Mutex::default(), changed: Condvar::new() };
    let mut buffers = BTreeMap::new();
    let (copied, read_seconds, verify_seconds) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(files, &stages));
        let verifier = scope.spawn(|| verify(files, &stages));
        scope.spawn(|| make_pipelines(prepare, &stages));
        let copied: Result<Duration> = {
            let _ended = Ended(&stages);
            let mut upload = Upload::new(gpu, &stages, files.total_bytes(), total, progress);
            let mut copy = || {
                for &id in &order {
                    let (tensor, shard) = shard_of(plan, id);
                    let segments = shard.segments.iter().map(|segment| (files.position(segment), files.bytes(segment)));
                    buffers.insert(id, upload.buffer(&tensor.name, padded_bytes(shard), segments)?);
                }
                gpu.wait()?;
                let busy = upload.busy();
                upload.wait_for_others()?;
                let pipelines = stages.lock().pipelines;
                upload.tell(files.total_bytes(), pipelines);
                Ok(busy)
            };
            copy()
        };
        let [read, verify] = [reader, verifier].map(|stage| stage.join().unwrap_or_else(|panic| resume_unwind(panic)));
        (copied, read, verify)
    });
    let loaded = Loaded {
        file_bytes: files.total_bytes(),
        copied_bytes: total,
        seconds: begin.elapsed().as_secs_f64(),
        read_seconds: read_seconds.as_secs_f64(),
        verify_seconds: verify_seconds.as_secs_f64(),
        copy_seconds: copied?.as_secs_f64(),
    };
    Ok((buffers, loaded))
}

/// Pipelines done, and all that are wanted.
type Made = (u64, u64);

/// How far the stages have come, in positions of the weight files.
#[derive(Debug, Default)]
struct State {
    /// All before is in memory.
    read: u64,
    /// All before was hashed.
    verified: u64,
    /// What is copied now; the end of all while the copying stage waits for others.
    wanted: u64,
    /// All files are what they should be.
    is_verified: bool,
    pipelines: Made,
    /// All pipelines were made.
    is_prepared: bool,
    /// What went wrong first.
    failed: Option<Error>,
    /// Nobody needs more.
    ended: bool,
}

/// What the stages tell one another.
struct Stages {
    state: Mutex<State>,
    changed: Condvar,
}

impl Stages {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn fail(&self, error: Error) {
        self.set(|state| {
            state.failed.get_or_insert(error);
        });
    }

    /// Waits until `may` says so. False if there is nothing to do any more.
    fn wait(&self, may: impl Fn(&State) -> bool) -> bool {
        let wait = |state: &mut State| !state.ended && !may(state);
        let state = self.changed.wait_while(self.lock(), wait).unwrap_or_else(PoisonError::into_inner);
        !state.ended
    }
}

/// Ends all stages when the caller's is done, with whatever result.
struct Ended<'a>(&'a Stages);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.set(|state| state.ended = true);
    }
}

/// Ends all stages if its thread panics: the others would wait for it for ever.
struct OnPanic<'a>(&'a Stages);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set(|state| state.ended = true);
        }
    }
}

/// The first stage: brings files into memory. Gives the time that took.
fn read(files: &WeightFiles, stages: &Stages) -> Duration {
    let mut busy = Duration::ZERO;
    let _guard = OnPanic(stages);
    for window in files.windows() {
        if !stages.wait(|state| window.positions.start < state.verified + LEAD) {
            break;
        }
        let begin = Instant::now();
        files.fetch(&window);
        busy += begin.elapsed();
        stages.set(|state| state.read = window.positions.end);
    }
    busy
}

/// The second stage: holds files against their hashes. Gives the time that took.
fn verify(files: &WeightFiles, stages: &Stages) -> Duration {
    let mut busy = Duration::ZERO;
    let mut verifier = files.verifier();
    let _guard = OnPanic(stages);
    for window in files.windows() {
        let Range { start, end } = window.positions;
        if !stages.wait(|state| state.read >= end && start < state.wanted.saturating_add(LEAD)) {
            return busy;
        }
        let begin = Instant::now();
        let taken = verifier.take(&window);
        busy += begin.elapsed();
        match taken {
            Ok(()) => stages.set(|state| state.verified = end),
            Err(error) => {
                stages.fail(error.into());
                return busy;
            }
        }
    }
    stages.set(|state| state.is_verified = true);
    busy
}

/// Beside the stages: makes pipelines.
fn make_pipelines(prepare: Prepare, stages: &Stages) {
    let _guard = OnPanic(stages);
    let made = prepare(&|progress| {
        if let Progress::Pipelines { done, total } = progress {
            stages.set(|state| state.pipelines = (done, total));
        }
    });
    match made {
        Ok(()) => stages.set(|state| state.is_prepared = true),
        Err(error) => stages.fail(error),
    }
}

/// A piece of a weight file with the position of its first byte.
type Piece<'a> = (u64, &'a [u8]);

/// The third stage: hands weights to the device, a bounded number of bytes at a time.
struct Upload<'a> {
    gpu: &'a Gpu,
    stages: &'a Stages,
    begin: Instant,
    /// Time in which nothing was there to be copied.
    idle: Duration,
    /// Bytes handed over since `pending`.
    in_flight: u64,
    /// What was submitted when half of [`IN_FLIGHT`] had been handed over.
    pending: Option<wgpu::SubmissionIndex>,
    done: u64,
    total: u64,
    verified: u64,
    pipelines: Made,
    file_bytes: u64,
    progress: &'a dyn Fn(Progress),
}

impl<'a> Upload<'a> {
    fn new(gpu: &'a Gpu, stages: &'a Stages, file_bytes: u64, total: u64, progress: &'a dyn Fn(Progress)) -> Self {
        let (begin, idle) = (Instant::now(), Duration::ZERO);
        let (pending, verified, pipelines) = (None, 0, (0, 0));
        Self {
            gpu,
            stages,
            begin,
            idle,
            in_flight: 0,
            pending,
            done: 0,
            total,
            verified,
            pipelines,
            file_bytes,
            progress,
        }
    }

    fn busy(&self) -> Duration {
        self.begin.elapsed().saturating_sub(self.idle)
    }

    /// A buffer of `bytes` bytes that holds the segments behind one another and then zeros.
    fn buffer<'b>(&mut self, name: &str, bytes: u64, mut segments: impl Iterator<Item = Piece<'b>>) -> Result<Buffer> {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let buffer = self.gpu.buffer(name, bytes, usage)?;
        // Segments follow one another without regard to the device's alignment of 4 bytes, so chunks are cut
        // from their concatenation.
        let mut rest: Piece = (0, &[]);
        let mut at = 0;
        while at < bytes {
            let size = CHUNK.min(bytes - at);
            let mut pieces: Vec<Piece> = Vec::new();
            let mut missing = size as usize;
            while missing > 0 {
                if rest.1.is_empty() {
                    let Some(segment) = segments.next() else { break };
                    rest = segment;
                }
                let (position, (now, later)) = (rest.0, rest.1.split_at(rest.1.len().min(missing)));
                self.wait_for(position..position + now.len() as u64)?;
                pieces.push((position, now));
                missing -= now.len();
                rest = (position + now.len() as u64, later);
            }
            self.hand_over(name, &buffer, at, size, &pieces)?;
            at += size;
        }
        Ok(buffer)
    }

    /// Writes pieces behind one another, and then zeros, to `size` bytes of a buffer.
    fn hand_over(&mut self, name: &str, buffer: &Buffer, at: u64, size: u64, pieces: &[Piece]) -> Result<()> {
        let bytes = NonZero::new(size).expect("only what has bytes is handed over");
        let mut view = match self.gpu.scoped(|| self.gpu.queue.write_buffer_with(&buffer.raw, at, bytes)) {
            Ok(Some(view)) => view,
            Ok(None) | Err(wgpu::Error::OutOfMemory { .. }) => {
                self.gpu.check()?;
                return Err(self.gpu.out_of_memory("staging of weights", size));
            }
            Err(error) => {
                let (device, what) = (self.gpu.info().name.clone(), format!("weight {name}: {error}"));
                return Err(Error::Refused { device, what });
            }
        };
        let mut filled = 0;
        for (_, piece) in pieces {
            view.slice(filled..filled + piece.len()).copy_from_slice(piece);
            filled += piece.len();
        }
        view.slice(filled..size as usize).fill(0);
        let handed = self.gpu.scoped(|| drop(view));
        handed.map_err(|error| self.gpu.refused(&format!("weight {name}"), &error))?;
        self.in_flight += size;
        self.done += size;
        if self.in_flight >= IN_FLIGHT / 2 {
            // The device copies this half while the next one is filled.
            let submitted = self.gpu.scoped(|| self.gpu.queue.submit([]));
            let submitted = submitted.map_err(|error| self.gpu.refused("an empty submission", &error))?;
            if let Some(before) = self.pending.replace(submitted) {
                self.gpu.wait_for(&before)?;
            }
            self.in_flight = 0;
        }
        self.gpu.check_stop()?;
        let (verified, pipelines) = {
            let state = self.stages.lock();
            (state.verified, state.pipelines)
        };
        self.tell(verified, pipelines);
        (self.progress)(Progress::Upload { done: self.done, total: self.total });
        Ok(())
    }

    /// Waits until these positions are verified, as far as that can be before their file's end.
    fn wait_for(&mut self, positions: Range<u64>) -> Result<()> {
        self.wait(positions.start, |state| state.verified >= positions.end)
    }

    /// Waits for the hash of every file, also those that nothing was copied from, and for the pipelines.
    fn wait_for_others(&mut self) -> Result<()> {
        self.wait(u64::MAX, |state| state.is_verified && state.is_prepared)
    }

    fn wait(&mut self, wanted: u64, enough: impl Fn(&State) -> bool) -> Result<()> {
        let begin = Instant::now();
        let stages = self.stages;
        let mut state = stages.lock();
        state.wanted = if enough(&state) { wanted } else { u64::MAX };
        stages.changed.notify_all();
        while !enough(&state) {
            if let Some(error) = state.failed.take() {
                return Err(error);
            }
            // A stage that ended in the midst has panicked, which its thread's end will tell.
            if state.ended {
                return Err(Error::Interrupted);
            }
            state = stages.changed.wait_timeout(state, NEWS).unwrap_or_else(PoisonError::into_inner).0;
            let (verified, pipelines) = (state.verified, state.pipelines);
            drop(state);
            self.gpu.check_stop()?;
            self.tell(verified, pipelines);
            state = stages.lock();
        }
        state.wanted = wanted;
        drop(state);
        self.idle += begin.elapsed();
        Ok(())
    }

    /// Tells the caller what is new.
    fn tell(&mut self, verified: u64, pipelines: Made) {
        if verified != self.verified {
            self.verified = verified;
            (self.progress)(Progress::Verify { done: verified, total: self.file_bytes });
        }
        if pipelines != self.pipelines {
            self.pipelines = pipelines;
            (self.progress)(Progress::Pipelines { done: pipelines.0, total: pipelines.1 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Selector;

    #[test]
    fn segments_of_any_length_follow_one_another_over_many_chunks() {
        let gpu =
            Gpu::open(&Selector::Default).unwrap_or_else(|error| panic!("this test needs a Vulkan device: {error}"));
        let lengths = [1, 0, 3, CHUNK as usize - 1, 7, 2 * CHUNK as usize, 65, 0, 12_345_678, 2];
        let total: usize = lengths.iter().sum();
        let bytes: Vec<u8> = (0..total as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        let mut rest = &bytes[..];
        let mut segments = Vec::new();
        for length in lengths {
            let (segment, behind) = rest.split_at(length);
            segments.push(segment);
            rest = behind;
        }
        let last = std::cell::Cell::new(0);
        let progress = |progress| {
            if let Progress::Upload { done, .. } = progress {
                last.set(done);
            }
        };
        let padded = (total as u64).next_multiple_of(16);
        let state = State { verified: u64::MAX, ..State::default() };
        let stages = Stages { state: Mutex::new(state), changed: Condvar::new() };
        let mut upload = Upload::new(&gpu, &stages, 0, padded, &progress);
        let buffer = upload.buffer("segments", padded, segments.into_iter().map(|bytes| (0, bytes))).unwrap();
        assert_eq!((buffer.bytes(), last.get()), (padded, padded));
        let words = gpu.read(gpu.encoder("read"), &[(&buffer, 0, padded)]).unwrap();
        let found: &[u8] = bytemuck::cast_slice(&words);
        assert!(found[..total] == bytes[..], "the bytes arrive in order");
        assert!(found[total..].iter().all(|&byte| byte == 0), "the padding is zero");
    }
}
