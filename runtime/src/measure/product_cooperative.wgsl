// C = AᵀB by cooperative matrices: f16 in, f32 out, all [N, N] and by rows. A workgroup is 2×2 subgroups; each makes 4×4
// matrices of C and keeps them while A and B come straight from memory. In front stand `N`, the size `S` of a matrix, the
// invocations `LANES` of a subgroup and the types `Left`, `Right` and `Sum`.
// Grid: N/8S × N/8S. Flops: 2·N³. Bound: multiplications, or what the caches deliver.
@group(0) @binding(0) var<storage, read> a: array<f16>;
@group(0) @binding(1) var<storage, read> b: array<f16>;
@group(0) @binding(2) var<storage, read_write> c: array<f32>;

@compute @workgroup_size(4 * LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_id) part: u32) {
    let row = (group.y * 2u + part / 2u) * 4u * S;
    let column = (group.x * 2u + part % 2u) * 4u * S;
    var c00 = Sum();
    var c01 = Sum();
    var c02 = Sum();
    var c03 = Sum();
    var c10 = Sum();
    var c11 = Sum();
    var c12 = Sum();
    var c13 = Sum();
    var c20 = Sum();
    var c21 = Sum();
    var c22 = Sum();
    var c23 = Sum();
    var c30 = Sum();
    var c31 = Sum();
    var c32 = Sum();
    var c33 = Sum();
    for (var k = 0u; k < N; k += S) {
        let a0 = coopLoad<Left>(&a[k * N + row + 0u * S], N);
        let a1 = coopLoad<Left>(&a[k * N + row + 1u * S], N);
        let a2 = coopLoad<Left>(&a[k * N + row + 2u * S], N);
        let a3 = coopLoad<Left>(&a[k * N + row + 3u * S], N);
        let b0 = coopLoadT<Right>(&b[k * N + column + 0u * S], N);
        let b1 = coopLoadT<Right>(&b[k * N + column + 1u * S], N);
        let b2 = coopLoadT<Right>(&b[k * N + column + 2u * S], N);
        let b3 = coopLoadT<Right>(&b[k * N + column + 3u * S], N);
        c00 = coopMultiplyAdd(a0, b0, c00);
        c01 = coopMultiplyAdd(a0, b1, c01);
        c02 = coopMultiplyAdd(a0, b2, c02);
        c03 = coopMultiplyAdd(a0, b3, c03);
        c10 = coopMultiplyAdd(a1, b0, c10);
        c11 = coopMultiplyAdd(a1, b1, c11);
        c12 = coopMultiplyAdd(a1, b2, c12);
        c13 = coopMultiplyAdd(a1, b3, c13);
        c20 = coopMultiplyAdd(a2, b0, c20);
        c21 = coopMultiplyAdd(a2, b1, c21);
        c22 = coopMultiplyAdd(a2, b2, c22);
        c23 = coopMultiplyAdd(a2, b3, c23);
        c30 = coopMultiplyAdd(a3, b0, c30);
        c31 = coopMultiplyAdd(a3, b1, c31);
        c32 = coopMultiplyAdd(a3, b2, c32);
        c33 = coopMultiplyAdd(a3, b3, c33);
    }
    coopStoreT(c00, &c[(row + 0u * S) * N + column + 0u * S], N);
    coopStoreT(c01, &c[(row + 0u * S) * N + column + 1u * S], N);
    coopStoreT(c02, &c[(row + 0u * S) * N + column + 2u * S], N);
    coopStoreT(c03, &c[(row + 0u * S) * N + column + 3u * S], N);
    coopStoreT(c10, &c[(row + 1u * S) * N + column + 0u * S], N);
    coopStoreT(c11, &c[(row + 1u * S) * N + column + 1u * S], N);
    coopStoreT(c12, &c[(row + 1u * S) * N + column + 2u * S], N);
    coopStoreT(c13, &c[(row + 1u * S) * N + column + 3u * S], N);
    coopStoreT(c20, &c[(row + 2u * S) * N + column + 0u * S], N);
    coopStoreT(c21, &c[(row + 2u * S) * N + column + 1u * S], N);
    coopStoreT(c22, &c[(row + 2u * S) * N + column + 2u * S], N);
    coopStoreT(c23, &c[(row + 2u * S) * N + column + 3u * S], N);
    coopStoreT(c30, &c[(row + 3u * S) * N + column + 0u * S], N);
    coopStoreT(c31, &c[(row + 3u * S) * N + column + 1u * S], N);
    coopStoreT(c32, &c[(row + 3u * S) * N + column + 2u * S], N);
    coopStoreT(c33, &c[(row + 3u * S) * N + column + 3u * S], N);
}
