//! What is asked: windows of a text, of random place and length.

use crate::cli::args::LoadArgs;

/// A text to cut prompts from, if the server's model has a tokenizer.
pub const PASSAGE: &str = include_str!("passage.txt");

/// A request that is sent again and again.
pub struct Job {
    pub prompt: Vec<u32>,
    pub max_tokens: u32,
    /// Sampled with this seed, or greedy.
    pub seed: Option<u64>,
}

/// All that may be asked.
pub struct Work {
    pub jobs: Vec<Job>,
}

impl Work {
    /// Draws the requests from the tokens of a text.
    pub fn new(args: &LoadArgs, tokens: &[u32]) -> anyhow::Result<Self> {
        anyhow::ensure!(!tokens.is_empty(), "{}: its tokenizer makes nothing of a text", args.url);
        let mut random = fastrand::Rng::with_seed(args.seed);
        let jobs = (0..args.distinct).map(|index| {
            let length = random.u32(args.prompt_tokens.0..=args.prompt_tokens.1) as usize;
            let start = random.usize(..tokens.len());
            Job {
                prompt: tokens.iter().cycle().skip(start).take(length).copied().collect(),
                max_tokens: random.u32(args.max_tokens.0..=args.max_tokens.1),
                seed: (index % 2 == 1).then(|| random.u64(..1 << 53)),
            }
        });
        Ok(Self { jobs: jobs.collect() })
    }
}
