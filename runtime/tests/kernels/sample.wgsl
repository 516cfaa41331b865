// Takes each row's largest logit and makes it the next batch. Grid [rows]; step.x is the program's most rows.
@group(0) @binding(0) var<uniform> batch: vec4<u32>;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // [rows, step.y]
@group(0) @binding(2) var<storage, read> row_tokens: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> tokens: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> rows: array<u32>;
@group(0) @binding(5) var<storage, read_write> seen: array<u32>; // [sequences, step.z]
@group(0) @binding(6) var<storage, read_write> finished: array<u32>; // count, then [32, step.x]
@group(0) @binding(7) var<uniform> step_: vec4<u32>;

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) group: vec3<u32>) {
    let row = group.x;
    if row >= batch.y {
        return;
    }
    var best = 0u;
    for (var v = 1u; v < step_.y; v++) {
        if logits[row * step_.y + v] > logits[row * step_.y + best] {
            best = v;
        }
    }
    let token = row_tokens[row];
    tokens[row] = vec4(best, token.x + 1u, token.y, 0u);
    rows[row] = row;
    seen[token.y * step_.z + best / 32u] |= 1u << (best % 32u);
    finished[1u + (finished[0] % 32u) * step_.x + row] = best;
}
