//! How fast a device multiplies matrices.

use moewe_plan::Access;
use wgpu::Features;

use super::{STORAGE, bind, dispatch, fastest, pipeline};
use crate::memory::Buffer;
use crate::{Error, Gpu, Result};

/// Floating-point operations a second of square matrix products, a multiplication and an addition counted as two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatrixRates {
    /// In f32.
    pub f32: f64,
    /// In f16, sums too, where kernels can compute in f16.
    pub f16: Option<f64>,
    /// By cooperative matrices of f16 with sums in f32, where the device is opened with them and has them 16×16×16 or
    /// 8×8×8.
    pub cooperative: Option<f64>,
}

impl MatrixRates {
    /// The fastest.
    pub fn best(&self) -> f64 {
        [self.f16, self.cooperative].into_iter().flatten().fold(self.f32, f64::max)
    }
}

/// Rows of the first matrices, a multiple of every kernel's tile. Their product is compared with the true one.
const FIRST: u32 = 256;
/// Rows of the largest matrices.
const LARGEST: u32 = 4096;
/// Matrices grow until their product takes so long: before, much of the time is not that of multiplying.
const LONG_ENOUGH: f64 = 0.01;

/// Formats of matrices.
#[derive(Clone, Copy, PartialEq)]
enum Format {
    F32,
    F16,
}

impl Format {
    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// A way of multiplying: C = AᵀB.
struct Product {
    name: &'static str,
    /// What stands before `source`, without `N`.
    head: String,
    source: &'static str,
    /// Format of A and B, and that of C.
    formats: [Format; 2],
    /// Rows and columns of C that a workgroup makes.
    tile: [u32; 2],
}

impl Product {
    fn plain(format: Format) -> Self {
        let (name, head) = match format {
            Format::F32 => ("product in f32", "alias T = f32;\n"),
            Format::F16 => ("product in f16", "enable f16;\nalias T = f16;\n"),
        };
        let source = include_str!("product.wgsl");
        Self { name, head: head.into(), source, formats: [format; 2], tile: [128, 128] }
    }

    fn by_eights() -> Self {
        let source = include_str!("product_by_eights.wgsl");
        let name = "product by subgroups of 8";
        Self { name, head: String::new(), source, formats: [Format::F32; 2], tile: [128, 32] }
    }

    /// By cooperative matrices of `size` rows and columns, with subgroups of `lanes`.
    fn cooperative(size: u32, lanes: u32) -> Self {
        let part =
            |name: &str, scalar: &str, role: &str| format!("alias {name} = coop_mat{size}x{size}<{scalar}, {role}>;\n");
        let head = format!(
            "enable f16;\nenable wgpu_cooperative_matrix;\nconst S: u32 = {size}u;\nconst LANES: u32 = {lanes}u;\n"
        ) + &part("Left", "f16", "A")
            + &part("Right", "f16", "B")
            + &part("Sum", "f32", "C");
        let source = include_str!("product_cooperative.wgsl");
        let (name, formats) = ("product by cooperative matrices", [Format::F16, Format::F32]);
        Self { name, head, source, formats, tile: [8 * size; 2] }
    }
}

/// Measures products of matrices that grow until one takes a hundredth of a second.
///
/// # Errors
/// [`Error::Refused`] if a product is wrong: such a device computes nothing that can be relied on.
pub fn matrix_rates(gpu: &Gpu) -> Result<MatrixRates> {
    let mut f32 = rate(gpu, &Product::plain(Format::F32))?;
    if gpu.info().subgroups && gpu.info().subgroup_size == [8, 8] {
        f32 = f32.max(rate(gpu, &Product::by_eights())?);
    }
    let has_f16 = gpu.device.features().contains(Features::SHADER_F16);
    let f16 = if has_f16 { Some(rate(gpu, &Product::plain(Format::F16))?) } else { None };
    let cooperative = match gpu.cooperative() {
        Some(size) => Some(rate(gpu, &Product::cooperative(size, gpu.info().subgroup_size[1]))?),
        None => None,
    };
    Ok(MatrixRates { f32, f16, cooperative })
}

/// Operations a second of a product, as fast as it becomes.
fn rate(gpu: &Gpu, product: &Product) -> Result<f64> {
    let (mut rows, mut best) = (FIRST, 0.0_f64);
    loop {
        let seconds = multiply(gpu, product, rows)?;
        best = best.max(2.0 * f64::from(rows).powi(3) / seconds);
        if seconds >= LONG_ENOUGH || rows >= LARGEST {
            return Ok(best);
        }
        rows *= 2;
    }
}

/// Seconds of a product of matrices with so many rows.
fn multiply(gpu: &Gpu, product: &Product, rows: u32) -> Result<f64> {
    let numbers = u64::from(rows).pow(2);
    let [factors, sums] = product.formats;
    let a = gpu.buffer("measure A", numbers * factors.bytes(), STORAGE)?;
    let b = gpu.buffer("measure B", numbers * factors.bytes(), STORAGE)?;
    let c = gpu.buffer("measure C", numbers * sums.bytes(), STORAGE)?;
    for (matrix, buffer) in [(0, &a), (1, &b)] {
        let bytes = encode(factors, (0..rows).flat_map(|row| (0..rows).map(move |column| entry(matrix, row, column))));
        gpu.scoped(|| gpu.queue.write_buffer(&buffer.raw, 0, &bytes))
            .map_err(|error| gpu.refused(product.name, &error))?;
    }
    let source = format!("{}const N: u32 = {rows}u;\n{}", product.head, product.source);
    let pipeline = pipeline(gpu, product.name, &source, &[Access::Read, Access::Read, Access::ReadWrite])?;
    let group = bind(gpu, &pipeline, &[&a, &b, &c])?;
    let grid = [rows / product.tile[1], rows / product.tile[0]];
    let seconds = fastest(gpu, 3, &|encoder| dispatch(encoder, &pipeline, &group, grid, 1))?;
    if rows == FIRST {
        check(gpu, product, &c)?;
    }
    Ok(seconds)
}

/// An entry of A (0) or B (1): −1, 0 or 1, so that the sums of the first matrices are exact in f16, too.
fn entry(matrix: u32, row: u32, column: u32) -> i8 {
    let mixed = (row * 7919 + column * 104_729 + matrix * 31).wrapping_mul(0x9e37_79b1);
    (mixed >> 24) as i8 % 2
}

fn encode(format: Format, numbers: impl Iterator<Item = i8>) -> Vec<u8> {
    match format {
        Format::F32 => numbers.flat_map(|number| f32::from(number).to_le_bytes()).collect(),
        // 1 is 0x3c00.
        Format::F16 => numbers.flat_map(|number| [0, [0xbc, 0, 0x3c][(number + 1) as usize]]).collect(),
    }
}

/// Compares all of the first product with the true one.
fn check(gpu: &Gpu, product: &Product, c: &Buffer) -> Result<()> {
    let sums = product.formats[1];
    let words = gpu.read(gpu.encoder("product"), &[(c, 0, u64::from(FIRST).pow(2) * sums.bytes())])?;
    let found: &[u8] = bytemuck::cast_slice(&words);
    for row in 0..FIRST {
        for column in 0..FIRST {
            let terms = (0..FIRST).map(|k| i32::from(entry(0, k, row)) * i32::from(entry(1, k, column)));
            let expected: i32 = terms.sum();
            let index = (row * FIRST + column) as usize;
            let found = match sums {
                Format::F32 => f32::from_bits(words[index]),
                Format::F16 => f16_value(u16::from_le_bytes([found[2 * index], found[2 * index + 1]])),
            };
            // Sums of small whole numbers are exact.
            if found.to_bits() != (expected as f32).to_bits() {
                let what = format!("{}: C[{row}, {column}] is {found}, expected {expected}", product.name);
                return Err(Error::Refused { device: gpu.info().name.clone(), what });
            }
        }
    }
    Ok(())
}

/// The number that these bits of an f16 are, subnormals taken as 0.
fn f16_value(bits: u16) -> f32 {
    let (sign, exponent, mantissa) = (u32::from(bits >> 15), u32::from(bits >> 10 & 31), u32::from(bits & 1023));
    match exponent {
        0 => 0.0,
        31 => f32::NAN,
        _ => f32::from_bits(sign << 31 | (exponent + 112) << 23 | mantissa << 13),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Selector;

    #[test]
    fn sums_are_exact_in_f16_and_not_all_alike() {
        let numbers: Vec<i8> = (0..FIRST).flat_map(|row| (0..FIRST).map(move |column| entry(0, row, column))).collect();
        for number in -1..=1 {
            assert!(numbers.iter().filter(|&&found| found == number).count() > 10_000, "{number}");
        }
        assert_ne!(entry(0, 1, 2), entry(0, 2, 1));
        let found = [0x3c00, 0xbc00, 0x4100, 0x0000, 0xd640, 0x03ff].map(|bits| f16_value(bits).to_bits());
        assert_eq!(found, [1.0, -1.0, 2.5, 0.0, -100.0, 0.0].map(f32::to_bits));
        assert!(f16_value(0x7c00).is_nan());
    }

    /// Another product, another place or another order of rows and columns is found out.
    #[test]
    fn wrong_products_are_refused() {
        let gpu =
            Gpu::open(&Selector::Default).unwrap_or_else(|error| panic!("this test needs a Vulkan device: {error}"));
        for (from, to) in [
            ("c70 += a1.w * b0;", "c70 += a1.z * b0;"),
            ("= c00;", "= c01;"),
            ("k < N;", "k < N - 8u;"),
            ("a[k * (N / 4u) + group.y", "b[k * (N / 4u) + group.y"),
        ] {
            let whole = include_str!("product.wgsl");
            let changed = whole.replacen(from, to, 1);
            assert_ne!(whole, changed, "{from}");
            let product = Product { source: changed.leak(), ..Product::plain(Format::F32) };
            let error = multiply(&gpu, &product, FIRST).unwrap_err().to_string();
            assert!(error.contains("product in f32: C[") && error.contains("expected"), "{error}");
        }
    }
}
