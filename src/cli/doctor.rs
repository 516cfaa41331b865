//! `moewe doctor`.

use moewe_compiler::profile::Profile;
use moewe_runtime::{AdapterInfo, Gpu, Selector};
use serde_json::{Value, json};

use super::args::DoctorArgs;
use super::speed::Speed;
use super::{model, output};

/// Shows devices, limits and speed.
pub fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let adapters = moewe_runtime::list();
    if adapters.is_empty() {
        Gpu::open(&Selector::Default)?; // says what to do
    }
    let Some(gpu) = model::open_device(&args.device)? else { return Ok(()) };
    let info = gpu.info();
    let profile = Profile::load(model::profile_for(info))?;
    let speed = Speed::measure(&gpu)?;
    if args.json {
        let mut value = json!({
            "devices": adapters.iter().map(as_json).collect::<Vec<_>>(),
            "chosen": info.index,
            "target": profile.name,
        });
        speed.add_to(&mut value);
        return output::json(&value);
    }
    let mut out = String::from("Vulkan devices\n");
    for adapter in &adapters {
        let chosen = if adapter.index == info.index { "  ← chosen" } else { "" };
        out += &format!(
            "  {}  {} ({}, {} {}){chosen}\n",
            adapter.index,
            adapter.name,
            adapter.device_type.name(),
            adapter.driver,
            adapter.driver_info
        );
    }
    let yes_no = |yes: bool| if yes { "yes" } else { "no" };
    out += &format!("\n{}\n", info.name);
    out += &format!("  largest binding        {}\n", output::bytes(info.max_binding_bytes as f64));
    out += &format!("  largest buffer         {}\n", output::bytes(info.max_buffer_bytes as f64));
    if let Some(memory) = info.memory_bytes {
        out += &format!("  memory                 {}\n", output::bytes(memory as f64));
    }
    out += &format!("  storage buffers        {} a kernel\n", info.storage_buffers);
    out += &format!(
        "  workgroups             {} invocations, {} of shared memory\n",
        info.workgroup_invocations,
        output::bytes(info.workgroup_bytes.into())
    );
    let sizes = if info.subgroup_size[0] == info.subgroup_size[1] {
        info.subgroup_size[0].to_string()
    } else {
        format!("{} to {}", info.subgroup_size[0], info.subgroup_size[1])
    };
    out += &format!("  subgroups              {}, size {sizes}\n", yes_no(info.subgroups));
    out += &format!("  f16 arithmetic         {} (not needed)\n", yes_no(info.shader_f16));
    let matrices: Vec<String> = info.cooperative.iter().map(|size| format!("{size}×{size}")).collect();
    let matrices = if matrices.is_empty() { "none".into() } else { matrices.join(", ") };
    out += &format!("  cooperative matrices   {matrices} (not needed)\n");
    out += &format!("  timestamps             {}\n", yes_no(info.timestamps));
    out += "\nMeasured\n";
    out += &speed.text();
    out += &format!("\nA checkpoint would be compiled for {}: {}.\n", profile.name, profile.description);
    Ok(output::write(&out)?)
}

fn as_json(adapter: &AdapterInfo) -> Value {
    json!({
        "index": adapter.index,
        "name": adapter.name,
        "type": adapter.device_type.name(),
        "driver": adapter.driver,
        "driver_info": adapter.driver_info,
        "max_binding_bytes": adapter.max_binding_bytes,
        "max_buffer_bytes": adapter.max_buffer_bytes,
        "memory_bytes": adapter.memory_bytes,
        "storage_buffers": adapter.storage_buffers,
        "workgroup_invocations": adapter.workgroup_invocations,
        "workgroup_bytes": adapter.workgroup_bytes,
        "subgroups": adapter.subgroups,
        "subgroup_size": adapter.subgroup_size,
        "shader_f16": adapter.shader_f16,
        "cooperative_matrices": adapter.cooperative,
        "timestamps": adapter.timestamps,
    })
}
