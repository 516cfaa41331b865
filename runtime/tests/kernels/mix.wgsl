// Six numbers for each token: its index in the batch times 100, plus its position times 10, plus the column. Grid [tokens].
@group(0) @binding(0) var<uniform> batch: vec4<u32>;
@group(0) @binding(1) var<storage, read> tokens: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> mix_: array<u32>;

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) group: vec3<u32>) {
    for (var c = 0u; c < 6u; c++) {
        mix_[group.x * 6u + c] = group.x * 100u + tokens[group.x].y * 10u + c;
    }
}
