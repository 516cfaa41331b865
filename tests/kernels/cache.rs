//! A cache of pages, and rows of latents in every format, written and read here as the formats' files say.

use moewe_oracle::numeric::{f16_to_f32, f32_to_f16};
use moewe_plan::{Latent, WeightFormat};

use super::data::{self, Rng, f64s};

const PAGE: usize = 64;

/// Numbers that share a scale, if any do.
pub fn group(latent: Latent) -> Option<usize> {
    match latent {
        Latent::F32 | Latent::F16 => None,
        Latent::Fp8 => Some(128),
        Latent::Q6 => Some(32),
    }
}

/// A row in a format: `row` has the latent, `rank` numbers, and the rope part.
pub fn encode(latent: Latent, rank: usize, row: &[f32]) -> Vec<u32> {
    let mut latents = row[..rank].to_vec();
    latents.resize(rank.next_multiple_of(16), 0.0);
    let mut rope = row[rank..].to_vec();
    rope.resize(rope.len().next_multiple_of(8), 0.0);
    let largest = |group: usize| -> Vec<f32> {
        row[..rank].chunks(group).map(|group| group.iter().fold(0.0, |most: f32, x| most.max(x.abs()))).collect()
    };
    let mut bytes: Vec<u8> = Vec::new();
    let cells = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(16), 0);
    let bf16 = |number: f32| ((number.to_bits() + 0x7fff + (number.to_bits() >> 16 & 1)) >> 16) as u16;
    match latent {
        Latent::F32 => bytes.extend(latents.iter().chain(&rope).flat_map(|x| x.to_le_bytes())),
        Latent::F16 => bytes.extend(latents.iter().chain(&rope).flat_map(|&x| f32_to_f16(x).to_le_bytes())),
        Latent::Fp8 => {
            let scales: Vec<f32> = largest(128).iter().map(|most| most.max(2f32.powi(-115)) / 448.0).collect();
            bytes.extend((0..latents.len()).map(|i| {
                let wanted = f64::from(latents[i]) / f64::from(scales[i / 128]);
                let distance = |code: u8| (f64::from(fp8(code)) - wanted.abs()).abs();
                let code = (0..=0x7e).min_by(|&a, &b| distance(a).total_cmp(&distance(b))).expect("127 codes");
                code | if wanted < 0.0 { 0x80 } else { 0 }
            }));
            bytes.extend(rope.iter().flat_map(|&x| bf16(x).to_le_bytes()));
            bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
        }
        Latent::Q6 => {
            let up = |scale: f32| f32::from_bits((scale.to_bits() + 0xffff) & 0xffff_0000);
            let scales: Vec<f32> = largest(32).iter().map(|most| up(most.max(2f32.powi(-115)) / 31.0)).collect();
            let codes: Vec<u8> =
                (0..latents.len()).map(|i| ((latents[i] / scales[i / 32]).round() + 32.0) as u8).collect();
            for unit in codes.chunks(16) {
                bytes.extend((0..8).map(|n| unit[n / 4 * 8 + n % 4] & 15 | (unit[n / 4 * 8 + 4 + n % 4] & 15) << 4));
            }
            cells(&mut bytes);
            for unit in codes.chunks(16) {
                bytes.extend((0..4).map(|n| (0..4).map(|quad| unit[4 * quad + n] >> 4 << (2 * quad)).sum::<u8>()));
            }
            cells(&mut bytes);
            bytes.extend(rope.iter().flat_map(|&x| bf16(x).to_le_bytes()));
            bytes.extend(scales.iter().flat_map(|&scale| bf16(scale).to_le_bytes()));
        }
    }
    cells(&mut bytes);
    bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes"))).collect()
}

fn fp8(code: u8) -> f32 {
    data::decode(WeightFormat::Fp8, u32::from(code))
}

/// The numbers of a row.
pub fn read(latent: Latent, rank: usize, rope: usize, words: &[u32]) -> Vec<f32> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let bf16 = |at: usize| f32::from_bits(u32::from(half(at)) << 16);
    let (units, padded) = (rank.div_ceil(16), rope.next_multiple_of(8));
    let number = |i: usize| match latent {
        Latent::F32 => f32::from_bits(words[i]),
        Latent::F16 => f16_to_f32(half(2 * i)),
        Latent::Fp8 if i < 16 * units => fp8(bytes[i]) * f32::from_bits(words[(16 * units + 2 * padded) / 4 + i / 128]),
        Latent::Fp8 => bf16(16 * units + 2 * (i - 16 * units)),
        Latent::Q6 => {
            let high = 16 * units.div_ceil(2);
            let ropes = high + 16 * units.div_ceil(4);
            let (unit, quad, n) = (i / 16, i % 16 / 4, i % 4);
            if i >= 16 * units {
                return bf16(ropes + 2 * (i - 16 * units));
            }
            let low = bytes[8 * unit + quad / 2 * 4 + n] >> (4 * (quad % 2)) & 15;
            let code = low | (bytes[high + 4 * unit + n] >> (2 * quad) & 3) << 4;
            (f32::from(code) - 32.0) * bf16(ropes + 2 * padded + 2 * (i / 32))
        }
    };
    (0..rank).chain((0..rope).map(|i| 16 * units + i)).map(number).collect()
}

/// A cache of pages, all NaN where nothing was written.
pub struct Cache {
    latent: Latent,
    rank: usize,
    rope: usize,
    pub words: Vec<u32>,
    /// [sequences, max_pages]
    pub table: Vec<u32>,
    pub max_pages: usize,
}

impl Cache {
    /// Pages in random order for `lengths` tokens of each sequence, and one page that belongs to nobody. Entries of the
    /// table behind a sequence's pages lead far outside.
    pub fn new(
        rng: &mut Rng,
        latent: Latent,
        (rank, rope): (usize, usize),
        max_pages: usize,
        lengths: &[usize],
    ) -> Self {
        let needed: usize = lengths.iter().map(|length| length.div_ceil(PAGE)).sum();
        let mut free = rng.permutation(needed + 1);
        let mut table = vec![u32::MAX; lengths.len() * max_pages];
        for (sequence, length) in lengths.iter().enumerate() {
            for page in 0..length.div_ceil(PAGE) {
                table[sequence * max_pages + page] = free.pop().expect("one for each") as u32;
            }
        }
        let words = vec![u32::MAX; (needed + 1) * PAGE * latent.words(rank as u64, rope as u64) as usize];
        Self { latent, rank, rope, words, table, max_pages }
    }

    /// Words of a row.
    pub fn row_words(&self) -> usize {
        self.latent.words(self.rank as u64, self.rope as u64) as usize
    }

    pub fn at(&self, sequence: usize, position: usize) -> usize {
        let page = self.table[sequence * self.max_pages + position / PAGE] as usize;
        (page * PAGE + position % PAGE) * self.row_words()
    }

    /// Writes a row, and returns it as it can be read back.
    pub fn write(&mut self, sequence: usize, position: usize, row: &[f32]) -> Vec<f64> {
        let at = self.at(sequence, position);
        let words = encode(self.latent, self.rank, row);
        self.words[at..][..words.len()].copy_from_slice(&words);
        assert_eq!(words.len(), self.row_words(), "{:?}", self.latent);
        f64s(&self.read(&self.words, sequence, position))
    }

    /// Numbers of a row of a cache of the same shape.
    pub fn read(&self, words: &[u32], sequence: usize, position: usize) -> Vec<f32> {
        read(self.latent, self.rank, self.rope, &words[self.at(sequence, position)..][..self.row_words()])
    }
}
