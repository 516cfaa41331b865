//! Device buffers, with a count of the bytes they hold.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use wgpu::BufferUsages;

use crate::{Error, Gpu, Result};

/// The bytes that buffers of a device hold.
#[derive(Debug)]
pub(crate) struct Memory {
    held: AtomicU64,
    budget: Option<u64>,
}

impl Memory {
    pub(crate) fn new(budget: Option<u64>) -> Self {
        Self { held: AtomicU64::new(0), budget }
    }

    pub(crate) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    pub(crate) fn budget(&self) -> Option<u64> {
        self.budget
    }

    /// Whether this many bytes more may be had, as far as is known.
    pub(crate) fn has(&self, bytes: u64) -> bool {
        self.budget.is_none_or(|budget| self.held().saturating_add(bytes) <= budget)
    }
}

/// A device buffer.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) raw: wgpu::Buffer,
    memory: Arc<Memory>,
}

impl Buffer {
    pub(crate) fn bytes(&self) -> u64 {
        self.raw.size()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.memory.held.fetch_sub(self.raw.size(), Ordering::Relaxed);
    }
}

/// Bytes of memory that a software driver can have: it takes them from the host, which would rather end this
/// program than refuse.
pub(crate) fn host_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available = line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10;
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some(group.map_or(available, |group: u64| group.min(available)))
}

impl Gpu {
    /// A buffer of zeros. Its length is rounded up to 16 bytes, the least that a binding may need.
    pub(crate) fn buffer(&self, name: &str, bytes: u64, usage: BufferUsages) -> Result<Buffer> {
        self.buffer_up_to(name, bytes, usage, self.buffer_limit(usage))
    }

    /// A buffer of zeros of at most `limit` bytes.
    pub(crate) fn buffer_up_to(&self, name: &str, bytes: u64, usage: BufferUsages, limit: u64) -> Result<Buffer> {
        let bytes = bytes.max(1).checked_next_multiple_of(16).unwrap_or(u64::MAX);
        if bytes > limit {
            return Err(Error::BufferTooLarge { name: name.into(), bytes, limit });
        }
        if !self.memory.has(bytes) {
            return Err(self.out_of_memory(name, bytes));
        }
        let descriptor = wgpu::BufferDescriptor { label: Some(name), size: bytes, usage, mapped_at_creation: false };
        match self.scoped(|| self.device.create_buffer(&descriptor)) {
            Ok(raw) => {
                self.check()?;
                self.memory.held.fetch_add(bytes, Ordering::Relaxed);
                Ok(Buffer { raw, memory: Arc::clone(&self.memory) })
            }
            Err(wgpu::Error::OutOfMemory { .. }) => Err(self.out_of_memory(name, bytes)),
            Err(error) => {
                Err(Error::Refused { device: self.info().name.clone(), what: format!("buffer {name}: {error}") })
            }
        }
    }

    /// Bytes of the largest buffer for this use.
    pub(crate) fn buffer_limit(&self, usage: BufferUsages) -> u64 {
        let mut limit = self.limits.max_buffer_size;
        if usage.contains(BufferUsages::STORAGE) {
            limit = limit.min(self.limits.max_storage_buffer_binding_size);
        }
        if usage.contains(BufferUsages::UNIFORM) {
            limit = limit.min(self.limits.max_uniform_buffer_binding_size);
        }
        limit & !15
    }

    /// Submits `encoder` after copying `bytes` of each source (from an offset) behind one another, waits, and returns
    /// them as words. Offsets and lengths are multiples of 4.
    pub(crate) fn read(&self, mut encoder: wgpu::CommandEncoder, sources: &[(&Buffer, u64, u64)]) -> Result<Vec<u32>> {
        let bytes: u64 = sources.iter().map(|source| source.2).sum();
        if bytes == 0 {
            let index = self.submit(self.finish(encoder)?)?;
            self.wait_for(&index)?;
            return Ok(Vec::new());
        }
        let target = self.buffer("readback", bytes, BufferUsages::COPY_DST | BufferUsages::MAP_READ)?;
        let mut at = 0;
        for &(source, offset, bytes) in sources {
            encoder.copy_buffer_to_buffer(&source.raw, offset, &target.raw, at, bytes);
            at += bytes;
        }
        let index = self.submit(self.finish(encoder)?)?;
        let slice = target.raw.slice(..bytes);
        let (sender, receiver) = mpsc::channel();
        let map = || slice.map_async(wgpu::MapMode::Read, move |mapped| drop(sender.send(mapped)));
        self.scoped(map).map_err(|error| self.refused("reading back", &error))?;
        self.wait_for(&index)?;
        let refused = |what: String| Error::Refused { device: self.info().name.clone(), what };
        // Another thread that polls may have taken over the message, and be about to deliver it.
        let mapped = receiver.recv().map_err(|_| refused("reading back was given up".into()))?;
        mapped.map_err(|error| refused(format!("reading back: {error}")))?;
        let view = slice.get_mapped_range().map_err(|error| refused(format!("reading back: {error}")))?;
        let words = view.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
        drop(view);
        target.raw.unmap();
        Ok(words)
    }

    /// A fresh command encoder.
    pub(crate) fn encoder(&self, label: &str) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(label) })
    }
}
