//! What a device can do at most, for `doctor` and `bench`.

use std::sync::Arc;

use moewe_plan::Precision;
use moewe_runtime::{Bandwidth, Gpu, MatrixRates, copy_bandwidth, dispatch_cost, matrix_rates, submit_latency};
use serde_json::{Value, json};

use super::output;

/// Figures of a device that were measured a moment ago.
pub struct Speed {
    bandwidth: Bandwidth,
    /// Microseconds of a dispatch that waits for the one before.
    dispatch: f64,
    /// Microseconds of a submission and of waiting for it.
    submit: f64,
    rates: MatrixRates,
}

impl Speed {
    /// Measures it all, in a second or two.
    pub fn measure(gpu: &Arc<Gpu>) -> anyhow::Result<Self> {
        let gpu = &gpu.with_cooperative()?;
        Ok(Self {
            bandwidth: copy_bandwidth(gpu)?,
            dispatch: dispatch_cost(gpu)?,
            submit: submit_latency(gpu)?,
            rates: matrix_rates(gpu)?,
        })
    }

    /// Bytes a second of the faster kind of copy: a floor must not be too high.
    pub fn bytes_per_second(&self) -> f64 {
        self.bandwidth.kernel.max(self.bandwidth.copy) * 1e9
    }

    /// Operations a second of the fastest product that kernels of this precision could make.
    pub fn flops_per_second(&self, precision: Precision) -> f64 {
        match precision {
            Precision::Exact => self.rates.f32,
            Precision::Fast => self.rates.best(),
        }
    }

    /// A line for each figure.
    pub fn text(&self) -> String {
        let Self { bandwidth, dispatch, submit, rates } = self;
        let rate =
            |rate: Option<f64>| rate.map_or_else(|| "none".into(), |rate| format!("{}FLOP/s", output::count(rate)));
        format!(
            "  copy, read and written {:.1} GB/s by a kernel, {:.1} GB/s by the driver ({} buffers)\n  \
             chained dispatch       {dispatch:.1} µs\n  \
             submit and wait        {submit:.0} µs\n  \
             matrix product         {} in f32, {} in f16, {} by cooperative matrices\n",
            bandwidth.kernel,
            bandwidth.copy,
            output::bytes(bandwidth.bytes as f64),
            rate(Some(rates.f32)),
            rate(rates.f16),
            rate(rates.cooperative),
        )
    }

    /// The same as fields of `target`, an object.
    pub fn add_to(&self, target: &mut Value) {
        let Self { bandwidth, dispatch, submit, rates } = self;
        target["copy_gigabytes_per_second"] = json!({ "kernel": bandwidth.kernel, "driver": bandwidth.copy });
        target["dispatch_microseconds"] = json!(dispatch);
        target["submit_and_wait_microseconds"] = json!(submit);
        target["matrix_flops_per_second"] =
            json!({ "f32": rates.f32, "f16": rates.f16, "cooperative": rates.cooperative });
    }
}
