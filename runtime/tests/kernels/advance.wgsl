// Counts a finished step. Grid [1].
@group(0) @binding(0) var<storage, read_write> finished: array<u32>;

@compute @workgroup_size(1)
fn main() {
    finished[0] += 1u;
}
