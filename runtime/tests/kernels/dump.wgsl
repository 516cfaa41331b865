// Copies a shard of a weight to words from step.x on. Grid [words].
@group(0) @binding(0) var<storage, read> weight: array<u32>;
@group(0) @binding(1) var<storage, read_write> dump: array<u32>;
@group(0) @binding(2) var<uniform> step_: vec4<u32>;

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) group: vec3<u32>) {
    dump[step_.x + group.x] = weight[group.x];
}
