// C = AᵀB, all [N, N] and by rows: a workgroup makes 128×128 of C, an invocation 8×8 of these in registers, from 8 rows of A and
// B at a time in workgroup memory. `N` (a multiple of 128) and the scalar type `T` stand in front.
// Grid: N/128 × N/128. Flops: 2·N³. Bound: multiplications.
alias V = vec4<T>;
@group(0) @binding(0) var<storage, read> a: array<V>;
@group(0) @binding(1) var<storage, read> b: array<V>;
@group(0) @binding(2) var<storage, read_write> c: array<V>;

var<workgroup> a_rows: array<V, 256>;
var<workgroup> b_rows: array<V, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let x = index % 16u;
    let y = index / 16u;
    let first = (index / 32u) * (N / 4u) + index % 32u;
    var c00 = V();
    var c01 = V();
    var c10 = V();
    var c11 = V();
    var c20 = V();
    var c21 = V();
    var c30 = V();
    var c31 = V();
    var c40 = V();
    var c41 = V();
    var c50 = V();
    var c51 = V();
    var c60 = V();
    var c61 = V();
    var c70 = V();
    var c71 = V();
    for (var k = 0u; k < N; k += 8u) {
        a_rows[index] = a[k * (N / 4u) + group.y * 32u + first];
        b_rows[index] = b[k * (N / 4u) + group.x * 32u + first];
        workgroupBarrier();
        for (var i = 0u; i < 8u; i++) {
            let a0 = a_rows[i * 32u + 2u * y];
            let a1 = a_rows[i * 32u + 2u * y + 1u];
            let b0 = b_rows[i * 32u + 2u * x];
            let b1 = b_rows[i * 32u + 2u * x + 1u];
            c00 += a0.x * b0;
            c01 += a0.x * b1;
            c10 += a0.y * b0;
            c11 += a0.y * b1;
            c20 += a0.z * b0;
            c21 += a0.z * b1;
            c30 += a0.w * b0;
            c31 += a0.w * b1;
            c40 += a1.x * b0;
            c41 += a1.x * b1;
            c50 += a1.y * b0;
            c51 += a1.y * b1;
            c60 += a1.z * b0;
            c61 += a1.z * b1;
            c70 += a1.w * b0;
            c71 += a1.w * b1;
        }
        workgroupBarrier();
    }
    let at = (group.y * 128u + y * 8u) * (N / 4u) + group.x * 32u + x * 2u;
    c[at + 0u * (N / 4u)] = c00;
    c[at + 0u * (N / 4u) + 1u] = c01;
    c[at + 1u * (N / 4u)] = c10;
    c[at + 1u * (N / 4u) + 1u] = c11;
    c[at + 2u * (N / 4u)] = c20;
    c[at + 2u * (N / 4u) + 1u] = c21;
    c[at + 3u * (N / 4u)] = c30;
    c[at + 3u * (N / 4u) + 1u] = c31;
    c[at + 4u * (N / 4u)] = c40;
    c[at + 4u * (N / 4u) + 1u] = c41;
    c[at + 5u * (N / 4u)] = c50;
    c[at + 5u * (N / 4u) + 1u] = c51;
    c[at + 6u * (N / 4u)] = c60;
    c[at + 6u * (N / 4u) + 1u] = c61;
    c[at + 7u * (N / 4u)] = c70;
    c[at + 7u * (N / 4u) + 1u] = c71;
}
