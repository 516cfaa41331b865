//! Taking times.

use std::time::Instant;

use moewe_plan::{PAGE_TOKENS, Sampling};
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

/// When something began.
pub(super) struct Clock {
    started: Instant,
    cpu: Option<f64>,
}

/// What something took: seconds, and those of processors in all threads of this process, a software driver's included, where
/// the system tells.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Taken {
    pub(super) seconds: f64,
    pub(super) cpu: Option<f64>,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self { started: Instant::now(), cpu: cpu_seconds() }
    }

    pub(super) fn stop(&self) -> Taken {
        let cpu = self.cpu.zip(cpu_seconds()).map(|(from, to)| to - from);
        Taken { seconds: self.started.elapsed().as_secs_f64(), cpu }
    }
}

/// Seconds that processors spent on this process so far.
#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "other systems do not tell")]
fn cpu_seconds() -> Option<f64> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Some(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
}

#[cfg(not(unix))]
fn cpu_seconds() -> Option<f64> {
    None
}

/// Of several runs of the same.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) seconds: Spread,
    pub(super) cpu: Option<Spread>,
}

impl Times {
    /// Of one run or more.
    pub(super) fn of(taken: &[Taken]) -> Self {
        let cpu: Option<Vec<f64>> = taken.iter().map(|taken| taken.cpu).collect();
        Self { seconds: Spread::of(taken.iter().map(|taken| taken.seconds).collect()), cpu: cpu.map(Spread::of) }
    }

    /// Milliseconds of processors for each of so many tokens, for tables.
    pub(super) fn cpu_cell(&self, tokens: u64) -> String {
        self.cpu.map_or_else(|| "–".into(), |cpu| format!("{:.2}", cpu.median * 1e3 / tokens as f64))
    }
}

pub(super) enum Measured {
    Times(Times),
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
    let mut taken = Vec::with_capacity(args.repeat as usize + 1);
    let mut sequences = Vec::new();
    let result = match work {
        Work::Prefill { prompt_tokens, batch } => (|| {
            for repeat in 0..=args.repeat {
                let length = if repeat == 0 { prompt_tokens.min(WARM_TOKENS) } else { prompt_tokens };
                add(session, &mut sequences, &mut tokens, length, batch)?;
                let clock = Clock::start();
                session.prefill(&sequences, Some(chunk))?;
                taken.push(clock.stop());
                clear(session, &mut sequences)?;
                if interrupt::is_set() {
                    return Err(Error::Interrupted);
                }
            }
            Ok(())
        })(),
        Work::Decode { context, batch, steps } => (|| {
            // With nothing in the cache, the only token is the one to run; otherwise prefill samples that.
            if context == 0 {
                add(session, &mut sequences, &mut tokens, 1, batch)?;
            } else {
                fill(session, &mut sequences, &mut tokens, (context, batch), chunk)?;
            }
            for repeat in 0..=args.repeat {
                let clock = Clock::start();
                let mut left = if repeat == 0 { steps.min(WARM_STEPS) } else { steps };
                while left > 0 {
                    let burst = left.min(MAX_BURST);
                    session.decode(&sequences, burst)?;
                    left -= burst;
                }
                taken.push(clock.stop());
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
        Ok(()) => Ok(Measured::Times(Times::of(&taken[1..]))), // the first one warmed up
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

/// Adds `batch` sequences with `context` tokens in their caches, and the next token sampled. Only the first one's are all
/// run: the others begin with copies of its full pages, so that each reads latents of its own and goes on differently.
fn fill(
    session: &mut Session,
    sequences: &mut Vec<SequenceId>,
    tokens: &mut Tokens,
    (context, batch): (u32, u32),
    chunk: usize,
) -> Result<(), Error> {
    let prompt = tokens.take(context);
    let first = session.add_sequence(&prompt, Sampling::default())?;
    sequences.push(first);
    session.prefill(sequences, Some(chunk))?;
    // At least one token is left to each.
    let full = (context - 1) / PAGE_TOKENS;
    let mut copies = vec![Vec::new(); batch as usize - 1];
    if !copies.is_empty() {
        let pages = session.pages_of(first)?[..full as usize].to_vec(); // the session changes while they are copied
        for page in pages {
            let latents = session.read_page(page)?;
            for copy in &mut copies {
                copy.push(session.load_page(&latents)?);
            }
            if interrupt::is_set() {
                return Err(Error::Interrupted);
            }
        }
    }
    let common = full * PAGE_TOKENS;
    for copy in copies {
        let text = [&prompt[..common as usize], &tokens.take(context - common)].concat();
        let sequence = session.add_sequence(&text, Sampling::default())?;
        sequences.push(sequence);
        session.adopt(sequence, &copy, None, false)?;
        session.release(&copy);
    }
    if batch > 1 {
        session.prefill(&sequences[1..], Some(chunk))?;
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
    fn clocks_tell_work_from_waiting() {
        let clock = Clock::start();
        std::thread::sleep(std::time::Duration::from_millis(60));
        let waited = clock.stop();
        let clock = Clock::start();
        let begun = Instant::now();
        while begun.elapsed().as_millis() < 60 {}
        let worked = clock.stop();
        assert!(waited.seconds >= 0.06 && worked.seconds >= 0.06);
        // Other tests run in this process meanwhile: more is possible, less is not.
        #[cfg(unix)]
        assert!(worked.cpu.unwrap() > 0.005 && waited.cpu.unwrap() >= 0.0);
        let times = Times::of(&[worked, Taken { cpu: None, ..worked }]);
        assert!(times.cpu.is_none() && times.cpu_cell(3) == "–");
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
