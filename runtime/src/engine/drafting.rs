//! How many tokens to draft behind each token: the number that makes the most tokens in a second, learned while running.
//!
//! With acceptance a_j of the j-th draft (given that those before it were accepted), a pass with n drafts makes
//! 1 + a_1 + a_1·a_2 + … + a_1⋯a_n tokens on average. [`Costs`] learns what such a pass takes beside one without drafts,
//! [`Drafting`] learns a_j for its sequence, and chooses the n with the best ratio.
//!
//! What is learned gets old. Where drafting does not pay, it is off, nothing is learned of it, and it is tried again after
//! a while: the more the last trial cost, the later, so that trials take less than [`TRIAL_SHARE`] of the time. Where
//! drafting is on, passes without drafts are timed anew now and then.

use moewe_plan::MAX_DRAFTS;

#[cfg(test)]
mod tests;

const LENGTHS: usize = MAX_DRAFTS as usize + 1;
/// Numbers of sequences are told apart by powers of two, up to 2¹⁵.
const BUCKETS: usize = 16;
/// The time of a length is known after so many passes. Of so many newest ones, the median counts: two may be wild.
const WINDOW: usize = 5;
/// What the newest median counts in the average.
const TIME_RATE: f64 = 1.0 / 8.0;
/// A median further away than this factor counts as if it were not: three of the newest may be wild, too.
const TIME_STEP: f64 = 1.5;
/// Passes after which a time is old, so that newer ones replace it instead of being averaged with it,
const STALE_PASSES: u64 = 512;
/// and after which it counts no more.
const FORGOTTEN_PASSES: u64 = 1024;

/// Acceptance that is assumed where nothing is known, and how many drafts this assumption counts for. It is high, since a
/// trial that is not made can teach nothing.
const PRIOR: f64 = 0.8;
const PRIOR_DRAFTS: f64 = 2.0;
/// Drafts over which acceptance of all sequences is averaged, after how many it is believed, and how many drafts of its own
/// it counts for with a new sequence.
const SHARED_DRAFTS: f64 = 1024.0;
const SHARED_LEAST: f64 = 64.0;
const SHARED_PRIOR: f64 = 8.0;
/// Drafts over which acceptance is averaged.
const ACCEPTANCE_DRAFTS: f64 = 64.0;
/// What remains, after another pass, of what is known of a place without a draft in that pass, and of the last loss.
const FORGETTING: f64 = 1.0 - 1.0 / 256.0;
/// Another length is chosen if it makes so many times more tokens in a second.
const HYSTERESIS: f64 = 1.02;
/// Passes of a trial, at least.
const TRIAL_PASSES: u32 = 4;
/// Share of the time that trials may take.
const TRIAL_SHARE: f64 = 1.0 / 64.0;
/// Tokens from one trial to the next.
const TRIAL_TOKENS: (u64, u64) = (64, 4096);
/// Passes of unknown time that a sequence may make: at first, and more with each so many tokens.
const UNKNOWN_PASSES: u32 = 40;
const UNKNOWN_TOKENS: u64 = 64;

/// How many tokens are drafted behind each one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mtp {
    /// None.
    Off,
    /// As many as pay.
    #[default]
    Auto,
    /// Always so many, if there are modules to draft and room for them.
    Fixed(usize),
}

/// What passes take, by drafts behind each token and by number of sequences, and what becomes of drafts on average. One
/// for all sequences of a session: a new one begins with what others have learned.
#[derive(Clone, Debug, Default)]
pub struct Costs {
    times: [[Time; LENGTHS]; BUCKETS],
    passes: [u64; BUCKETS],
    /// Average acceptance at each place, and how many drafts it counts for.
    rates: [(f64, f64); LENGTHS - 1],
}

#[derive(Clone, Copy, Debug, Default)]
struct Time {
    /// The newest times, in a ring.
    newest: [f64; WINDOW],
    count: usize,
    seconds: Option<f64>,
    /// Passes of its bucket when it was seen last.
    seen: u64,
}

impl Costs {
    /// Takes in what a pass took: one that only decodes, with so many drafts behind each token. What is not a time above
    /// zero is ignored.
    pub fn saw(&mut self, drafts: usize, sequences: usize, seconds_per_pass: f64) {
        let bucket = bucket(sequences);
        if drafts >= LENGTHS || !seconds_per_pass.is_finite() || seconds_per_pass <= 0.0 {
            return;
        }
        self.passes[bucket] += 1;
        let passes = self.passes[bucket];
        let time = &mut self.times[bucket][drafts];
        if passes - time.seen > STALE_PASSES {
            time.count = 0;
        }
        time.seen = passes;
        time.newest[time.count % WINDOW] = seconds_per_pass;
        time.count += 1;
        if time.count >= WINDOW {
            let mut sorted = time.newest;
            sorted.sort_unstable_by(f64::total_cmp);
            let median = sorted[WINDOW / 2];
            let old = time.seconds.filter(|_| time.count > WINDOW).unwrap_or(median);
            let new = median.clamp(old / TIME_STEP, old * TIME_STEP);
            time.seconds = Some(old + (new - old) * TIME_RATE);
        }
    }

    /// Takes in what became of the drafts of a pass of any sequence, as [`Drafting::saw`] does for its own.
    pub fn saw_drafts(&mut self, drafted: usize, accepted: usize) {
        for (index, (rate, weight)) in self.rates.iter_mut().enumerate().take(drafted.min(accepted + 1)) {
            *weight = (*weight + 1.0).min(SHARED_DRAFTS);
            *rate += (f64::from(index < accepted) - *rate) / *weight;
        }
    }

    /// What sequences have found acceptance to be at a place, and how many drafts of a new one that counts for.
    fn prior(&self, index: usize) -> Option<(f64, f64)> {
        let (rate, weight) = self.rates[index];
        (weight >= SHARED_LEAST).then_some((rate, SHARED_PRIOR))
    }

    /// What a pass with so many drafts takes, if it is known.
    fn seconds(&self, drafts: usize, sequences: usize) -> Option<f64> {
        let (passes, time) = (self.passes[bucket(sequences)], &self.times[bucket(sequences)][drafts]);
        time.seconds.filter(|_| passes - time.seen <= FORGOTTEN_PASSES)
    }

    /// The same, in passes without drafts.
    fn relative(&self, drafts: usize, sequences: usize) -> Option<f64> {
        Some(self.seconds(drafts, sequences)? / self.seconds(0, sequences)?)
    }

    /// Whether passes without drafts are to be timed anew.
    fn plain_is_stale(&self, sequences: usize) -> bool {
        let (passes, plain) = (self.passes[bucket(sequences)], &self.times[bucket(sequences)][0]);
        passes - plain.seen >= STALE_PASSES || plain.count < WINDOW
    }
}

fn bucket(sequences: usize) -> usize {
    (sequences.max(1).ilog2() as usize).min(BUCKETS - 1)
}

/// Chooses the number of drafts for one sequence.
#[derive(Clone, Debug)]
pub struct Drafting {
    mtp: Mtp,
    max: usize,
    positions: [Position; LENGTHS - 1],
    /// What pays best as far as is known.
    length: usize,
    state: State,
    /// Passes of unknown time that may still be made, and tokens since the last one was allowed.
    unknown_passes: u32,
    unknown_tokens: u64,
    /// What the pass that is being made takes, in passes without drafts.
    relative: f64,
    /// Whether it believes others that drafting does not pay, before it has tried.
    trusts: bool,
    /// Whether the last choice was made to learn.
    learns: bool,
}

/// Drafts at one place behind the newest token.
#[derive(Clone, Copy, Debug, Default)]
struct Position {
    drafted: u64,
    accepted: u64,
    /// Average acceptance where all drafts before were accepted, and how many drafts it counts for.
    rate: f64,
    weight: f64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Drafting since so many passes. The last ones lost so many tokens against not drafting (negative: gained).
    On { passes: u32, loss: f64 },
    /// Not drafting for so many more tokens.
    Off { tokens: u64 },
}

impl Drafting {
    /// For a sequence of a model that can draft up to `max` tokens.
    pub fn new(mtp: Mtp, max: usize) -> Self {
        Self {
            mtp,
            max: max.min(LENGTHS - 1),
            positions: Default::default(),
            length: 1,
            state: State::On { passes: 0, loss: 0.0 },
            unknown_passes: UNKNOWN_PASSES,
            unknown_tokens: 0,
            relative: 1.0,
            trusts: false,
            learns: false,
        }
    }

    /// The same, but it believes others that drafting does not pay, and tries it later.
    #[must_use]
    pub fn trusting(self) -> Self {
        Self { trusts: true, ..self }
    }

    /// Whether the last choice is to be made anew after a single pass.
    pub fn learns(&self) -> bool {
        self.mtp == Mtp::Auto && self.learns
    }

    /// How many tokens to draft for the next pass, in which so many sequences take part.
    pub fn next(&mut self, costs: &Costs, sequences: usize) -> usize {
        match self.mtp {
            Mtp::Off => 0,
            Mtp::Fixed(drafts) => drafts.min(self.max),
            Mtp::Auto if self.max == 0 => 0,
            Mtp::Auto => {
                let drafts = self.choose(costs, sequences);
                self.relative = costs.relative(drafts, sequences).unwrap_or(1.0);
                drafts
            }
        }
    }

    /// Takes in what became of a pass: how many drafts there were, maybe none or fewer than [`Drafting::next`] said, and
    /// how many of them, from the first, were accepted.
    pub fn saw(&mut self, drafted: usize, accepted: usize) {
        let drafted = drafted.min(LENGTHS - 1);
        let accepted = accepted.min(drafted);
        for (index, position) in self.positions[..drafted].iter_mut().enumerate() {
            position.drafted += 1;
            position.accepted += u64::from(index < accepted);
            // Drafts behind the first rejected one teach nothing.
            if index <= accepted {
                position.weight = (position.weight + 1.0).min(ACCEPTANCE_DRAFTS);
                position.rate += (f64::from(index < accepted) - position.rate) / position.weight;
            }
        }
        if drafted > 0 {
            for position in &mut self.positions[drafted..] {
                position.weight *= FORGETTING;
            }
        }
        let tokens = 1 + accepted as u64;
        self.unknown_tokens += tokens;
        if self.unknown_tokens >= UNKNOWN_TOKENS {
            self.unknown_tokens = 0;
            self.unknown_passes = (self.unknown_passes + 1).min(UNKNOWN_PASSES);
        }
        match &mut self.state {
            State::On { passes, loss } if drafted > 0 => {
                *passes = passes.saturating_add(1);
                *loss = *loss * FORGETTING + self.relative - tokens as f64;
            }
            State::On { .. } => {}
            State::Off { tokens: left } => *left = left.saturating_sub(tokens),
        }
    }

    /// For each place behind the newest token, how often a token was drafted for it, and how often it was accepted.
    pub fn acceptance(&self) -> Vec<(u64, u64)> {
        self.positions[..self.max].iter().map(|position| (position.drafted, position.accepted)).collect()
    }

    fn choose(&mut self, costs: &Costs, sequences: usize) -> usize {
        if let State::Off { tokens } = self.state {
            if tokens > 0 {
                self.learns = false;
                return 0;
            }
            // What was known of acceptance is as old as the last trial.
            for position in &mut self.positions {
                position.weight = 0.0;
            }
            self.state = State::On { passes: 0, loss: 0.0 };
        }
        let makes = self.tokens_per_pass(costs);
        // Tokens in the time in which a pass without drafts makes one.
        let gain = |drafts: usize| {
            let relative = costs.relative(drafts, sequences);
            relative.map(|relative| makes[drafts] / relative)
        };
        if let Some(drafts) = self.unknown(gain, &makes, costs, sequences) {
            self.unknown_passes -= 1;
            self.learns = true;
            return drafts;
        }
        let known = (1..=self.max).filter_map(|drafts| Some((drafts, gain(drafts)?)));
        let Some((best, most)) = known.max_by(|a, b| a.1.total_cmp(&b.1)) else { return 0 };
        if self.length == 0 || gain(self.length).is_none_or(|now| most > now * HYSTERESIS) {
            self.length = best;
        }
        let needed = if self.trusts && costs.prior(0).is_some() { 0 } else { TRIAL_PASSES };
        self.trusts = false;
        self.learns = matches!(self.state, State::On { passes, .. } if passes < TRIAL_PASSES);
        match self.state {
            State::On { passes, loss } if passes >= needed && most * HYSTERESIS < 1.0 => {
                let (least, most) = TRIAL_TOKENS;
                let tokens = ((loss.max(0.0) / TRIAL_SHARE) as u64).next_power_of_two().clamp(least, most);
                self.state = State::Off { tokens };
                (self.length, self.learns) = (0, false);
            }
            _ => {}
        }
        self.length
    }

    /// A length whose passes are to be timed, if there is one and it is its time.
    fn unknown(
        &self,
        gain: impl Fn(usize) -> Option<f64>,
        makes: &[f64; LENGTHS],
        costs: &Costs,
        sequences: usize,
    ) -> Option<usize> {
        if self.unknown_passes == 0 {
            return None;
        }
        if (1..=self.max).all(|drafts| costs.seconds(drafts, sequences).is_none()) {
            return Some(1);
        }
        if costs.plain_is_stale(sequences) {
            return Some(0);
        }
        // At best, it takes as long as one draft fewer.
        let best = (0..=self.max).filter_map(&gain).fold(1.0, f64::max);
        let hoped = |drafts: usize| Some(gain(drafts - 1)? / makes[drafts - 1] * makes[drafts]);
        (1..=self.max)
            .find(|&drafts| gain(drafts).is_none() && hoped(drafts).is_some_and(|most| most > best * HYSTERESIS))
    }

    /// Tokens that a pass makes, by its drafts.
    fn tokens_per_pass(&self, costs: &Costs) -> [f64; LENGTHS] {
        let mut tokens = [1.0; LENGTHS];
        let (mut rate, mut all) = (PRIOR, 1.0);
        for (index, position) in self.positions.iter().enumerate() {
            // Where nobody knows, a draft is taken to be as good as the one before it.
            let (prior, weight) = costs.prior(index).unwrap_or((rate, PRIOR_DRAFTS));
            rate = (weight * prior + position.weight * position.rate) / (weight + position.weight);
            all *= rate;
            tokens[index + 1] = tokens[index] + all;
        }
        tokens
    }
}
