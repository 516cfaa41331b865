// The same product for subgroups of 8, as software drivers have them, where a load costs far more than a multiplication: a subgroup
// makes 16×32 of C, each lane a vec4 of 16 rows. A lane loads the A of two rows, and the others hear of it.
// Grid: N/32 × N/128 (a workgroup is 8 subgroups). Flops: 2·N³. Bound: loads.
@group(0) @binding(0) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> c: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let lane = index % 8u;
    let row = group.y * 128u + index / 8u * 16u;
    let column = group.x * 8u + lane;
    var c0 = vec4<f32>();
    var c1 = vec4<f32>();
    var c2 = vec4<f32>();
    var c3 = vec4<f32>();
    var c4 = vec4<f32>();
    var c5 = vec4<f32>();
    var c6 = vec4<f32>();
    var c7 = vec4<f32>();
    var c8 = vec4<f32>();
    var c9 = vec4<f32>();
    var c10 = vec4<f32>();
    var c11 = vec4<f32>();
    var c12 = vec4<f32>();
    var c13 = vec4<f32>();
    var c14 = vec4<f32>();
    var c15 = vec4<f32>();
    for (var k = 0u; k < N; k++) {
        let a0 = a[k * N + row + lane];
        let a1 = a[k * N + row + lane + 8u];
        let line = b[k * (N / 4u) + column];
        c0 += subgroupBroadcast(a0, 0u) * line;
        c1 += subgroupBroadcast(a0, 1u) * line;
        c2 += subgroupBroadcast(a0, 2u) * line;
        c3 += subgroupBroadcast(a0, 3u) * line;
        c4 += subgroupBroadcast(a0, 4u) * line;
        c5 += subgroupBroadcast(a0, 5u) * line;
        c6 += subgroupBroadcast(a0, 6u) * line;
        c7 += subgroupBroadcast(a0, 7u) * line;
        c8 += subgroupBroadcast(a1, 0u) * line;
        c9 += subgroupBroadcast(a1, 1u) * line;
        c10 += subgroupBroadcast(a1, 2u) * line;
        c11 += subgroupBroadcast(a1, 3u) * line;
        c12 += subgroupBroadcast(a1, 4u) * line;
        c13 += subgroupBroadcast(a1, 5u) * line;
        c14 += subgroupBroadcast(a1, 6u) * line;
        c15 += subgroupBroadcast(a1, 7u) * line;
    }
    let at = row * (N / 4u) + column;
    c[at + 0u * (N / 4u)] = c0;
    c[at + 1u * (N / 4u)] = c1;
    c[at + 2u * (N / 4u)] = c2;
    c[at + 3u * (N / 4u)] = c3;
    c[at + 4u * (N / 4u)] = c4;
    c[at + 5u * (N / 4u)] = c5;
    c[at + 6u * (N / 4u)] = c6;
    c[at + 7u * (N / 4u)] = c7;
    c[at + 8u * (N / 4u)] = c8;
    c[at + 9u * (N / 4u)] = c9;
    c[at + 10u * (N / 4u)] = c10;
    c[at + 11u * (N / 4u)] = c11;
    c[at + 12u * (N / 4u)] = c12;
    c[at + 13u * (N / 4u)] = c13;
    c[at + 14u * (N / 4u)] = c14;
    c[at + 15u * (N / 4u)] = c15;
}
