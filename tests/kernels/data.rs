//! Inputs, weights in every storage format, and how results are compared.

use moewe_oracle::numeric;
pub use moewe_oracle::tolerance::{TOLERANCES, compare, magnitudes, product_size, swiglu_size};
use moewe_plan::WeightFormat;
use moewe_shaders::Variant;

/// Formats for rows of any length.
pub const FORMATS: [WeightFormat; 4] = [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::F16, WeightFormat::Fp8];
/// Formats for rows that divide into groups of 32 numbers, each with an f16 scale.
pub const GROUPED: [WeightFormat; 2] = [WeightFormat::Int8, WeightFormat::Int4];

/// Fails if a result is wrong; says how good it is otherwise.
#[track_caller]
pub fn assert_agrees(kernel: &str, what: &str, got: &[f32], want: &[f64], size: &[f64]) {
    match compare(kernel, got, want, size) {
        Ok(worst) => println!("{kernel} {what}: {} numbers, error {worst:.1e}", got.len()),
        Err(error) => panic!("{kernel} {what}: {error}"),
    }
}

/// SplitMix64.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Of either sign, between 2⁻⁵ and 4 in magnitude.
    pub fn number(&mut self) -> f32 {
        let magnitude = 2f64.powf(self.unit() * 7.0 - 5.0);
        (if self.next() & 1 == 0 { magnitude } else { -magnitude }) as f32
    }

    pub fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }

    /// Weights of a norm: around 1.
    pub fn norm(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| 0.5 + self.unit() as f32).collect()
    }

    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        (1..list.len()).for_each(|i| list.swap(i, self.below(i + 1)));
    }

    /// The numbers below `n` in random order.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        self.shuffle(&mut all);
        all
    }
}

pub fn f64s(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|&number| f64::from(number)).collect()
}

/// A product in f32 as an f16 holds it, times a power of two: rounded to 11 bits, at any magnitude.
pub fn round_f16(product: f64) -> f64 {
    let number = product as f32;
    if number == 0.0 || !number.is_finite() {
        return number.into();
    }
    // Half of the last bit that stays, and one less where that bit is 0: ties go to even.
    let half = 0xfff + (number.to_bits() >> 13 & 1);
    f32::from_bits((number.to_bits() + half) & !0x1fff).into()
}

/// Number that a code stands for.
pub fn decode(format: WeightFormat, code: u32) -> f32 {
    match format {
        WeightFormat::F32 => f32::from_bits(code),
        WeightFormat::Bf16 => numeric::bf16_to_f32(code as u16),
        WeightFormat::F16 => numeric::f16_to_f32(code as u16),
        WeightFormat::Fp8 => numeric::e4m3_to_f32(code as u8),
        WeightFormat::Int8 => f32::from(code as u8 as i8),
        WeightFormat::Int4 => code as f32 - 8.0,
    }
}

/// Nearest code of a number.
pub fn encode(format: WeightFormat, number: f32) -> u32 {
    match format {
        WeightFormat::F32 => number.to_bits(),
        WeightFormat::Bf16 => numeric::f32_to_bf16(number).into(),
        WeightFormat::F16 => numeric::f32_to_f16(number).into(),
        WeightFormat::Fp8 => numeric::f32_to_e4m3(number).into(),
        WeightFormat::Int8 | WeightFormat::Int4 => panic!("codes of {format:?} mean nothing without a scale"),
    }
}

/// A weight matrix as it stands on the device, or experts below one another.
#[derive(Clone)]
pub struct Matrix {
    pub format: WeightFormat,
    pub columns: usize,
    pub codes: Vec<u32>,
    /// Empty for formats without scales.
    pub scales: Vec<f32>,
    /// Rows of one expert, or all.
    rows: usize,
    block: [usize; 2],
}

impl Matrix {
    /// A matrix of given codes with scales of 1 (FP8).
    pub fn of(format: WeightFormat, rows: usize, columns: usize, codes: Vec<u32>) -> Self {
        assert_eq!(codes.len(), rows * columns);
        let block = if GROUPED.contains(&format) { [1, 32] } else { [5, 8] };
        let mut matrix = Self { format, columns, codes, scales: Vec::new(), rows, block };
        if format == WeightFormat::Fp8 || GROUPED.contains(&format) {
            let [rows, columns] = matrix.scale_shape();
            matrix.scales = vec![1.0; rows * columns];
        }
        matrix
    }

    /// Random numbers; among 16 a zero, a subnormal, or one of the largest that do no harm.
    pub fn random(rng: &mut Rng, format: WeightFormat, rows: usize, columns: usize) -> Self {
        let code = |rng: &mut Rng| match (rng.below(16), format) {
            (_, WeightFormat::Fp8) => loop {
                let code = rng.below(256) as u32;
                if code & 0x7f != 0x7f {
                    break code;
                }
            },
            (_, WeightFormat::Int8) => rng.below(256) as u32,
            (_, WeightFormat::Int4) => rng.below(16) as u32,
            (0, _) => encode(format, if rng.next() & 1 == 0 { 0.0 } else { -0.0 }),
            (1, WeightFormat::F32) => 1 + rng.below(1000) as u32,
            (1, WeightFormat::Bf16) => 1 + rng.below(127) as u32,
            (1, WeightFormat::F16) => 0x8000 | (1 + rng.below(1023) as u32),
            _ => encode(format, rng.number()),
        };
        let codes = (0..rows * columns).map(|_| code(rng)).collect();
        let mut matrix = Self::of(format, rows, columns, codes);
        let grouped = GROUPED.contains(&format);
        for scale in &mut matrix.scales {
            *scale = 2f32.powf(rng.unit() as f32 * 4.0 - 8.0);
            if grouped {
                // Some are subnormal, some zero, some negative.
                let wild = *scale * [1.0, -1.0, 1e-5, 0.0][rng.below(16).min(3)];
                *scale = numeric::f16_to_f32(numeric::f32_to_f16(wild));
            }
        }
        matrix
    }

    /// Another block size, scales anew.
    pub fn blocks(mut self, rng: &mut Rng, block: [usize; 2]) -> Self {
        self.block = block;
        if self.format == WeightFormat::Fp8 {
            let [rows, columns] = self.scale_shape();
            self.scales = (0..rows * columns).map(|_| 0.01 + rng.unit() as f32).collect();
        }
        self
    }

    /// Several experts of random numbers.
    pub fn experts(rng: &mut Rng, format: WeightFormat, experts: usize, rows: usize, columns: usize) -> Self {
        let mut all = Self::random(rng, format, rows, columns);
        for _ in 1..experts {
            let more = Self::random(rng, format, rows, columns);
            all.codes.extend(more.codes);
            all.scales.extend(more.scales);
        }
        all
    }

    /// Whether rows divide into blocks of so many numbers, each with one scale.
    pub fn divides_into(&self, block: usize) -> bool {
        let one_scale = self.scales.is_empty() || self.block[1].is_multiple_of(block);
        self.columns.is_multiple_of(block) && one_scale
    }

    /// Another block size for experts, scales anew.
    pub fn expert_blocks(mut self, rng: &mut Rng, block: [usize; 2]) -> Self {
        let experts = self.codes.len() / (self.rows * self.columns);
        self = self.blocks(rng, block);
        for _ in 1..experts * usize::from(!self.scales.is_empty()) {
            let [rows, columns] = self.scale_shape();
            self.scales.extend((0..rows * columns).map(|_| 0.01 + rng.unit() as f32));
        }
        self
    }

    /// Rows and columns that share a scale.
    pub fn block(&self) -> [usize; 2] {
        self.block
    }

    fn scale_shape(&self) -> [usize; 2] {
        [self.rows.div_ceil(self.block[0]), self.columns.div_ceil(self.block[1])]
    }

    /// Plugs the format and the shape of the scales into a variant.
    pub fn plug(&self, variant: Variant) -> Variant {
        let variant = variant.weight(self.format);
        if self.scales.is_empty() {
            return variant;
        }
        let [rows, columns] = self.scale_shape();
        variant
            .int("SCALE_ROWS", rows)
            .int("SCALE_COLUMNS", columns)
            .int("BLOCK_ROWS", self.block[0])
            .int("BLOCK_COLUMNS", self.block[1])
    }

    /// The decoded numbers.
    pub fn numbers(&self) -> Vec<f64> {
        let [scale_rows, scale_columns] = self.scale_shape();
        let number = |(i, &code): (usize, &u32)| {
            let (row, column) = (i / self.columns, i % self.columns);
            let (expert, row) = (row / self.rows, row % self.rows);
            let block = (expert * scale_rows + row / self.block[0]) * scale_columns + column / self.block[1];
            let scale = self.scales.get(block).copied().unwrap_or(1.0);
            f64::from(decode(self.format, code)) * f64::from(scale)
        };
        self.codes.iter().enumerate().map(number).collect()
    }

    /// Decoded numbers of one expert.
    pub fn expert(&self, expert: usize) -> Vec<f64> {
        let size = self.rows * self.columns;
        self.numbers()[expert * size..][..size].to_vec()
    }

    /// Scales as they lie in device memory: f32, or pairs of f16.
    pub fn scale_words(&self) -> Vec<u32> {
        if !GROUPED.contains(&self.format) {
            return self.scales.iter().map(|scale| scale.to_bits()).collect();
        }
        let half = |scale: &f32| u32::from(numeric::f32_to_f16(*scale));
        self.scales.chunks(2).map(|pair| half(&pair[0]) | pair.get(1).map_or(0, half) << 16).collect()
    }

    /// Rows as they lie in device memory, each padded to four numbers.
    pub fn row_words(&self, first: usize, count: usize) -> Vec<u32> {
        let mut bytes = Vec::new();
        if self.format == WeightFormat::Int4 {
            let pairs = self.codes[first * self.columns..][..count * self.columns].chunks_exact(8);
            return pairs.map(|eight| (0..).zip(eight).fold(0, |word, (i, code)| word | code << (4 * i))).collect();
        }
        let size = self.format.bits() as usize / 8;
        for row in self.codes[first * self.columns..][..count * self.columns].chunks(self.columns) {
            bytes.extend(row.iter().flat_map(|code| code.to_le_bytes().into_iter().take(size)));
            bytes.resize(bytes.len() + (self.columns.next_multiple_of(4) - self.columns) * size, 0);
        }
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
    }
}
