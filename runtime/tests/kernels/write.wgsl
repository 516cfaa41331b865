// Writes each token's id where the page table says. Grid [tokens].
@group(0) @binding(0) var<uniform> batch: vec4<u32>;
@group(0) @binding(1) var<storage, read> tokens: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> page_table: array<u32>; // [sequences, step.x]
@group(0) @binding(3) var<storage, read_write> cache: array<u32>; // [pages, 64]
@group(0) @binding(4) var<uniform> step_: vec4<u32>;

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) group: vec3<u32>) {
    if group.x >= batch.x {
        return;
    }
    let token = tokens[group.x];
    let page = page_table[token.z * step_.x + token.y / 64u];
    cache[page * 64u + token.y % 64u] = token.x;
}
