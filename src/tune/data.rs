//! Random numbers for the buffers of a case, and what they stand for.

use std::collections::HashMap;

use moewe_compiler::lower::Tensor;
use moewe_compiler::select::Scales;
use moewe_oracle::numeric;
use moewe_plan::{Weight, WeightFormat};

/// Words after which the numbers of large matrices repeat: a prime, so that they do not along rows or columns.
const PERIOD: u64 = 1_048_573;

/// SplitMix64.
pub(super) struct Random(u64);

impl Random {
    /// A sequence of its own for each name.
    pub(super) fn named(seed: u64, name: &str) -> Self {
        Self(name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        }))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// The bits of a number of either sign, between 1/16 and 1 in magnitude.
    pub(super) fn number(&mut self) -> u32 {
        let bits = self.next();
        (bits as u32 & 0x807f_ffff) | (123 + (bits >> 32) as u32 % 4) << 23
    }

    /// The bits of a number from 1/2 to 3/2.
    fn near_one(&mut self) -> u32 {
        (0.5 + (self.next() >> 40) as f32 / (1u64 << 24) as f32).to_bits()
    }
}

/// What stands in a weight, the same in each of its shards.
#[derive(Debug)]
pub(super) struct Contents {
    /// The first words; they repeat.
    pub(super) pattern: Vec<u32>,
}

/// The contents of weights, by their indices.
#[derive(Debug)]
pub(super) struct Numbers {
    contents: Vec<Contents>,
}

impl Numbers {
    /// Random ones for the weights of a case; the same for the same seed.
    pub(super) fn new(weights: &[Weight], tensors: &[Tensor], seed: u64) -> Self {
        let scales: HashMap<u32, Scales> = tensors.iter().filter_map(|tensor| tensor.scales).collect();
        let contents = weights.iter().zip(0..).map(|(weight, index)| {
            let mut random = Random::named(seed, &weight.name);
            let most = weight.shards.iter().map(|shard| shard.count).max().unwrap_or(0);
            let words = most * slice_words(weight);
            let pattern = match scales.get(&index) {
                Some(_) if weight.format == WeightFormat::F16 => (0..words).map(|_| two_halves(&mut random)).collect(),
                // Between 1/64 and 1/32, as are those of real models.
                Some(_) => (0..words).map(|_| random.near_one() & 0x007f_ffff | 121 << 23).collect(),
                None if weight.shape[0] == 1 && weight.format == WeightFormat::F32 => {
                    (0..words).map(|_| random.near_one()).collect()
                }
                None => matrix(weight, words, &mut random),
            };
            Contents { pattern }
        });
        Self { contents: contents.collect() }
    }

    /// What stands in a weight.
    pub(super) fn of(&self, weight: u32) -> &Contents {
        &self.contents[weight as usize]
    }

    /// The numbers of a vector.
    pub(super) fn vector(&self, tensor: Tensor, length: usize) -> Vec<f64> {
        self.of(tensor.weight).pattern[..length].iter().map(|&word| f64::from(f32::from_bits(word))).collect()
    }

    /// A row of a matrix, or of that of one expert.
    pub(super) fn row(&self, weights: &[Weight], tensor: Tensor, expert: Option<usize>, row: usize) -> Vec<f64> {
        let weight = &weights[tensor.weight as usize];
        let columns = *weight.shape.last().expect("a matrix") as usize;
        let row_bits = columns.next_multiple_of(4) as u64 * weight.format.bits();
        let slice = expert.unwrap_or(row) as u64;
        let shard = weight.shards.iter().rfind(|shard| shard.first <= slice).expect("shards begin with 0");
        let inside = if expert.is_some() { row as u64 * row_bits } else { 0 };
        let first = (slice - shard.first) * slice_words(weight) * 32 + inside;
        let pattern = &self.of(tensor.weight).pattern;
        let bits = weight.format.bits();
        (0..columns)
            .map(|column| {
                let at = first + column as u64 * bits;
                let word = pattern[(at / 32 % pattern.len() as u64) as usize];
                let code = (u64::from(word) >> (at % 32) & ((1 << bits) - 1)) as u32;
                f64::from(decode(weight.format, code)) * self.scale(tensor, expert.unwrap_or(0), row, column)
            })
            .collect()
    }

    fn scale(&self, tensor: Tensor, expert: usize, row: usize, column: usize) -> f64 {
        let Some((index, scales)) = tensor.scales else { return 1.0 };
        let Scales { rows, columns, block } = scales;
        let at = (expert * rows + row / block[0]) * columns + column / block[1];
        let pattern = &self.of(index).pattern;
        if block[0] == 1 {
            // Those of groups, in pairs.
            return f64::from(numeric::f16_to_f32((pattern[at / 2] >> (at % 2 * 16)) as u16));
        }
        f64::from(f32::from_bits(pattern[at]))
    }
}

/// Words of a slice of a weight along its first dimension.
pub(super) fn slice_words(weight: &Weight) -> u64 {
    weight.slice_bytes().expect("checked configurations have sane shapes").div_ceil(4)
}

/// Two positive scales in f16, between 2⁻⁷ and 2⁻⁵.
fn two_halves(random: &mut Random) -> u32 {
    let bits = random.next() as u32;
    (bits & 0x07ff_07ff) + 0x2000_2000
}

/// Codes of finite numbers of moderate size. What pads rows is zero.
fn matrix(weight: &Weight, words: u64, random: &mut Random) -> Vec<u32> {
    let columns = *weight.shape.last().expect("a matrix");
    let padded = columns.next_multiple_of(4);
    let bits = weight.format.bits();
    // Smaller in longer rows, as in real models: routers must not saturate, nor f16 go below its smallest exponent.
    let smaller = (columns.ilog2() / 2).min(6);
    let word = |random: &mut Random| {
        let word = random.next() as u32;
        match weight.format {
            WeightFormat::F32 => random.number() - (smaller << 23),
            // Exponents from 2⁻⁷ to 1, less that.
            WeightFormat::Bf16 => (word & 0x83ff_83ff | 0x3c00_3c00) - smaller * 0x0080_0080,
            WeightFormat::F16 => (word & 0x9fff_9fff | 0x2000_2000) - smaller * 0x0400_0400,
            // No NaN, which has all bits but the sign.
            WeightFormat::Fp8 => word & 0xfefe_fefe,
            WeightFormat::Int8 | WeightFormat::Int4 => word,
        }
    };
    if padded == columns {
        return (0..words.min(PERIOD)).map(|_| word(random)).collect();
    }
    (0..words)
        .map(|at| {
            let fill = word(random);
            let inside = |element: u64| (at * 32 / bits + element) % padded < columns;
            let mask = (0..32 / bits).filter(|&element| inside(element));
            fill & mask.fold(0, |mask, element| mask | (((1u64 << bits) - 1) << (element * bits)) as u32)
        })
        .collect()
}

/// The number that a code stands for, without its scale.
fn decode(format: WeightFormat, code: u32) -> f32 {
    match format {
        WeightFormat::F32 => f32::from_bits(code),
        WeightFormat::Bf16 => numeric::bf16_to_f32(code as u16),
        WeightFormat::F16 => numeric::f16_to_f32(code as u16),
        WeightFormat::Fp8 => numeric::e4m3_to_f32(code as u8),
        WeightFormat::Int8 => f32::from(code as u8 as i8),
        WeightFormat::Int4 => code as f32 - 8.0,
    }
}

#[cfg(test)]
mod tests {
    use moewe_plan::Shard;

    use super::*;

    #[test]
    fn numbers_are_finite_moderate_and_differ() {
        for (format, columns) in [
            (WeightFormat::F32, 5),
            (WeightFormat::Bf16, 64),
            (WeightFormat::F16, 7),
            (WeightFormat::Fp8, 9),
            (WeightFormat::Int8, 32),
            (WeightFormat::Int4, 64),
        ] {
            let shards = [(0, 3), (3, 2)].map(|(first, count)| Shard { first, count, segments: Vec::new() });
            let weight = Weight { name: "w".into(), format, shape: vec![5, columns], shards: shards.to_vec() };
            let tensor = Tensor { weight: 0, scales: None };
            let weights = [weight];
            let numbers = Numbers::new(&weights, &[tensor], 1);
            let rows: Vec<Vec<f64>> = (0..5).map(|row| numbers.row(&weights, tensor, None, row)).collect();
            assert!(rows.iter().flatten().all(|x| x.is_finite() && x.abs() <= 448.0), "{format:?}");
            assert!(rows.iter().flatten().any(|x| *x < 0.0) && rows.iter().flatten().any(|x| *x > 0.0), "{format:?}");
            assert_ne!(rows[0], rows[1]);
            assert_eq!(rows[0], rows[3], "each shard begins anew");
            assert_ne!(
                numbers.row(&weights, tensor, None, 1),
                Numbers::new(&weights, &[tensor], 2).row(&weights, tensor, None, 1)
            );
        }
    }
}
