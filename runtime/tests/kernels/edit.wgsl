// Multiplies each logit of a row and adds an offset. Grid [rows].
@group(0) @binding(0) var<storage, read> offset: array<f32>; // [step.y]
@group(0) @binding(1) var<storage, read> scale: array<f32>; // [2], for even and odd tokens
@group(0) @binding(2) var<storage, read_write> logits: array<f32>; // [rows, step.y]
@group(0) @binding(3) var<uniform> step_: vec4<u32>;

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) group: vec3<u32>) {
    for (var v = 0u; v < step_.y; v++) {
        let i = group.x * step_.y + v;
        logits[i] = logits[i] * scale[v % 2u] + offset[v];
    }
}
