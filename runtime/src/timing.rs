//! Timestamps of the steps of a run.

use moewe_plan::RunTimes;
use wgpu::{BufferUsages, ComputePassTimestampWrites};

use crate::memory::Buffer;
use crate::{Gpu, Result};

/// Steps whose beginnings and ends one query set holds.
const STEPS_PER_SET: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;
/// Bytes of the timestamps of one step.
pub(crate) const STEP_BYTES: u64 = 16;

/// Room for the timestamps of one run, used by one run after the other.
#[derive(Debug)]
pub(crate) struct Queries {
    sets: Vec<wgpu::QuerySet>,
    resolved: Buffer,
}

impl Queries {
    /// Room for so many steps.
    pub(crate) fn new(gpu: &Gpu, steps: usize) -> Result<Self> {
        let make = || {
            let descriptor = wgpu::QuerySetDescriptor {
                label: Some("steps"),
                ty: wgpu::QueryType::Timestamp,
                count: wgpu::QUERY_SET_MAX_QUERIES,
            };
            gpu.device.create_query_set(&descriptor)
        };
        let sets = (0..steps.div_ceil(STEPS_PER_SET)).map(|_| gpu.scoped(make));
        let sets: std::result::Result<Vec<_>, _> = sets.collect();
        let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
        Ok(Self {
            sets: sets.map_err(|error| gpu.refused("timestamps", &error))?,
            resolved: gpu.buffer("timestamps", steps as u64 * STEP_BYTES, usage)?,
        })
    }

    /// The timestamps of the pass of the n-th step that runs.
    pub(crate) fn writes(&self, step: usize) -> ComputePassTimestampWrites<'_> {
        let first = (step % STEPS_PER_SET * 2) as u32;
        ComputePassTimestampWrites {
            query_set: &self.sets[step / STEPS_PER_SET],
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        }
    }

    /// Records that the timestamps of the first `steps` steps are copied to `target` from byte `at` on.
    pub(crate) fn copy(&self, encoder: &mut wgpu::CommandEncoder, steps: usize, target: &Buffer, at: u64) {
        for (index, set) in self.sets.iter().enumerate() {
            let first = index * STEPS_PER_SET;
            let count = steps.saturating_sub(first).min(STEPS_PER_SET);
            // Only queries that were written may be resolved: the device would wait for others forever.
            if count > 0 {
                encoder.resolve_query_set(set, 0..count as u32 * 2, &self.resolved.raw, first as u64 * STEP_BYTES);
            }
        }
        if steps > 0 {
            encoder.copy_buffer_to_buffer(&self.resolved.raw, 0, &target.raw, at, steps as u64 * STEP_BYTES);
        }
    }
}

/// Times of a run from the timestamps (beginning and end, in ticks of `period` nanoseconds) of the steps that ran.
/// A clock that wraps around or runs backwards gives zeros, and no start before the one of the step before.
pub(crate) fn times(program: u32, rows: u32, ran: &[bool], ticks: &[[u64; 2]], period: f32) -> RunTimes {
    let nanoseconds = |ticks: u64| (ticks as f64 * f64::from(period)) as u64;
    let origin = ticks.first().map_or(0, |[begin, _]| *begin);
    let mut times = RunTimes { program, rows, starts: Vec::with_capacity(ran.len()), durations: Vec::new() };
    let mut ticks = ticks.iter();
    let mut latest = 0;
    for ran in ran {
        let (start, duration) = match ran.then(|| ticks.next()).flatten() {
            Some([begin, end]) => {
                latest = nanoseconds(begin.saturating_sub(origin)).max(latest);
                (Some(latest), nanoseconds(end.saturating_sub(*begin)))
            }
            None => (None, 0),
        };
        times.starts.push(start);
        times.durations.push(duration);
    }
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_begin_at_the_first_step_and_know_what_was_left_out() {
        let ran = [false, true, true, false, true];
        let found = times(3, 7, &ran, &[[100, 104], [110, 120], [121, 122]], 2.5);
        assert_eq!((found.program, found.rows), (3, 7));
        assert_eq!(found.starts, [None, Some(0), Some(25), None, Some(52)]);
        assert_eq!(found.durations, [0, 10, 25, 0, 2]);
    }

    #[test]
    fn clocks_that_wrap_or_run_backwards_give_no_nonsense() {
        let found = times(0, 0, &[true; 4], &[[u64::MAX - 1, 3], [2, u64::MAX], [5, 4], [u64::MAX, u64::MAX]], 1.0);
        assert_eq!(found.starts, [Some(0), Some(0), Some(0), Some(1)]);
        assert_eq!(found.durations, [0, u64::MAX - 2, 0, 0].map(|n| (n as f64) as u64));
        for period in [0.0, f32::NAN, f32::INFINITY, -1.0] {
            let found = times(0, 0, &[true; 2], &[[1, 9], [12, 30]], period);
            assert!(found.starts[0] <= found.starts[1], "{period}: {found:?}");
        }
        // Fewer timestamps than steps cannot come from us, and are no reason to fail.
        assert_eq!(times(0, 0, &[true; 2], &[], 1.0).starts, [None, None]);
    }
}
