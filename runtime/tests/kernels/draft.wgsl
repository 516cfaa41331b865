// For each row: the sum of the ids at positions from 1 to its token's, each times its position plus one; and what the run
// before left for its token. Grid [rows].
@group(0) @binding(0) var<uniform> batch: vec4<u32>;
@group(0) @binding(1) var<storage, read> tokens: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> rows: array<u32>;
@group(0) @binding(3) var<storage, read> page_table: array<u32>; // [sequences, step.x]
@group(0) @binding(4) var<storage, read> draft_cache: array<u32>; // [pages, 64]
@group(0) @binding(5) var<storage, read> hidden: array<u32>; // [tokens]
@group(0) @binding(6) var<storage, read_write> drafted: array<vec2<u32>>; // [rows]
@group(0) @binding(7) var<uniform> step_: vec4<u32>;

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) group: vec3<u32>) {
    if group.x >= batch.y {
        return;
    }
    let token = tokens[rows[group.x]];
    var sum = 0u;
    for (var j = 1u; j <= token.y; j++) {
        let page = page_table[token.z * step_.x + j / 64u];
        sum += draft_cache[page * 64u + j % 64u] * (j + 1u);
    }
    drafted[group.x] = vec2(sum, hidden[rows[group.x]]);
}
