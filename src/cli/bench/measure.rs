//! Taking times.

use std::time::Instant;

use moewe_plan::Sampling;
use moewe_runtime::{Error, MAX_BURST, SequenceId, Session};
use serde_json::{Value, json};

use super::super::args::BenchArgs;
use super::super::interrupt;
use super::plain::Work;

/// Steps of decoding, and tokens of each prompt, that warm up: enough for every program and buffer to have been used.
const WARM_STEPS: u32 = 4;
const WARM_TOKENS: u32 = 64;

/// Seconds of several runs of the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// Of one number or more.
    pub(super) fn of(mut numbers: Vec<f64>) -> Self {
        numbers.sort_by(f64::total_cmp);
        let (last, half) = (numbers.len() - 1, numbers.len() / 2);
        Self { median: f64::midpoint(numbers[half], numbers[last - half]), min: numbers[0], max: numbers[last] }
    }

    /// Tokens a second, if so many took these seconds.
    pub(super) fn rates(self, tokens: u64) -> Self {
        let tokens = tokens as f64;
        Self { median: tokens / self.median, min: tokens / self.max, max: tokens / self.min }
    }

    pub(super) fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

pub(super) enum Measured {
    Seconds(Spread),
    /// Ctrl-C came first.
    Interrupted,
}

/// Random tokens: the state of SplitMix64, and the size of the vocabulary.
pub(super) struct Tokens(u64, u64);

impl Tokens {
    /// Of a seed and a vocabulary.
    pub(super) fn new(seed: u64, vocab_size: u32) -> Self {
        Self(seed, vocab_size.into())
    }

    pub(super) fn take(&mut self, count: u32) -> Vec<u32> {
        let next = |_| {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % self.1) as u32
        };
        (0..count).map(next).collect()
    }
}

/// Measures a line. No sequence is left behind.
pub(super) fn measure(session: &mut Session, work: Work, chunk: usize, args: &BenchArgs) -> anyhow::Result<Measured> {
    let mut tokens = Tokens::new(args.seed, session.model().plan().model.vocab_size);
    let mut seconds = Vec::with_capacity(args.repeat as usize);
    let mut sequences = Vec::new();
    let result = match work {
        Work::Prefill { prompt_tokens, batch } => (|| {
            for repeat in 0..=args.repeat {
                let length = if repeat == 0 { prompt_tokens.min(WARM_TOKENS) } else { prompt_tokens };
                add(session, &mut sequences, &mut tokens, length, batch)?;
                let started = Instant::now();
                session.prefill(&sequences, Some(chunk))?;
                seconds.push(started.elapsed().as_secs_f64());
                clear(session, &mut sequences)?;
                if interrupt::is_set() {
                    return Err(Error::Interrupted);
                }
            }
            Ok(())
        })(),
        Work::Decode { context, batch, steps } => (|| {
            // With nothing in the cache, the only token is the one to run; otherwise prefill samples that.
            add(session, &mut sequences, &mut tokens, context.max(1), batch)?;
            if context > 0 {
                session.prefill(&sequences, Some(chunk))?;
            }
            for repeat in 0..=args.repeat {
                let started = Instant::now();
                let mut left = if repeat == 0 { steps.min(WARM_STEPS) } else { steps };
                while left > 0 {
                    let burst = left.min(MAX_BURST);
                    session.decode(&sequences, burst)?;
                    left -= burst;
                }
                seconds.push(started.elapsed().as_secs_f64());
                for &sequence in &sequences {
                    session.rewind(sequence, context as usize + 1)?;
                }
                if interrupt::is_set() {
                    return Err(Error::Interrupted);
                }
            }
            Ok(())
        })(),
    };
    clear(session, &mut sequences)?;
    match result {
        Ok(()) => Ok(Measured::Seconds(Spread::of(seconds.split_off(1)))), // the first one warmed up
        Err(Error::Interrupted) => Ok(Measured::Interrupted),
        Err(error) => Err(error.into()),
    }
}

fn add(
    session: &mut Session,
    sequences: &mut Vec<SequenceId>,
    tokens: &mut Tokens,
    length: u32,
    batch: u32,
) -> Result<(), Error> {
    for _ in 0..batch {
        sequences.push(session.add_sequence(&tokens.take(length), Sampling::default())?);
    }
    Ok(())
}

fn clear(session: &mut Session, sequences: &mut Vec<SequenceId>) -> Result<(), Error> {
    sequences.drain(..).try_for_each(|sequence| session.remove_sequence(sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Spread::of(vec![3.0]), Spread { median: 3.0, min: 3.0, max: 3.0 });
        assert_eq!(Spread::of(vec![5.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 5.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 9.0]), Spread { median: 3.0, min: 1.0, max: 9.0 });
    }

    #[test]
    fn tokens_are_of_the_vocabulary_and_the_seed() {
        let take = |seed| Tokens::new(seed, 320).take(10_000);
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
        let mut seen = [0; 320];
        for id in take(1) {
            seen[id as usize] += 1;
        }
        assert!(seen.iter().all(|&count| count > 5), "{seen:?}");
    }
}
