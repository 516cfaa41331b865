// Logits of each row: the further behind the next token, the lower. Grid [rows].
@group(0) @binding(0) var<uniform> batch: vec4<u32>;
@group(0) @binding(1) var<storage, read> tokens: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> rows: array<u32>;
@group(0) @binding(3) var<storage, read> page_table: array<u32>; // [sequences, step.x]
@group(0) @binding(4) var<storage, read> cache: array<u32>; // [pages, 64]
@group(0) @binding(5) var<storage, read> sampling: array<u32>; // [sequences, 8]
@group(0) @binding(6) var<storage, read> seen: array<u32>; // [sequences, step.z]
@group(0) @binding(7) var<storage, read> low: array<u32>; // rows 0 to 2 of the table, 8 bytes each
@group(0) @binding(8) var<storage, read> high: array<u32>; // rows 3 to 6
@group(0) @binding(9) var<storage, read_write> logits: array<f32>; // [rows, step.y]
@group(0) @binding(10) var<storage, read_write> row_tokens: array<vec2<u32>>; // position and sequence of each row
@group(0) @binding(11) var<uniform> step_: vec4<u32>;

fn table_byte(row: u32, column: u32) -> u32 {
    let shift = 8u * (column % 4u);
    if row < 3u {
        return (low[row * 2u + column / 4u] >> shift) & 255u;
    }
    return (high[(row - 3u) * 2u + column / 4u] >> shift) & 255u;
}

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) group: vec3<u32>) {
    let row = group.x;
    if row >= batch.y {
        return;
    }
    let token = tokens[rows[row]];
    var sum = 0u;
    for (var j = 0u; j <= token.y; j++) {
        let page = page_table[token.z * step_.x + j / 64u];
        sum += cache[page * 64u + j % 64u] * (j + 1u);
    }
    let next = (sum * 5u + token.y + 3u + table_byte(token.x % 7u, token.x % 6u)) % step_.y;
    let fresh = bitcast<f32>(sampling[token.z * 8u + 3u]) != 1.0;
    for (var v = 0u; v < step_.y; v++) {
        var behind = f32((v + step_.y - next) % step_.y);
        let bit = (seen[token.z * step_.z + v / 32u] >> (v % 32u)) & 1u;
        if fresh && bit == 1u {
            behind += 1000.0;
        }
        logits[row * step_.y + v] = -behind;
    }
    row_tokens[row] = token.yz;
}
