// Copies the batch, and leaves a number for each token: its id times 1000 plus its position. Grid [tokens].
@group(0) @binding(0) var<uniform> batch: vec4<u32>;
@group(0) @binding(1) var<storage, read> tokens: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> copy: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> hidden: array<u32>;

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) group: vec3<u32>) {
    let token = tokens[group.x];
    copy[group.x] = token;
    hidden[group.x] = token.x * 1000u + token.y;
}
