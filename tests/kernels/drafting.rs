//! `accept` and `propose` against a host that says the same in plain words.

use moewe_plan::{DRAFT_WORDS, FINISHED_STEPS, Group, Header, MAX_DRAFTS, POISONED, REJECTED, TokenInfo};
use moewe_shaders::Variant;

use super::data::Rng;
use super::harness::Call;

const MAX_ROWS: usize = 64;
const STEPS: usize = FINISHED_STEPS as usize;
const WORDS: usize = DRAFT_WORDS as usize;
const VOCAB: usize = 100;

/// Everything that the two kernels read or write.
#[derive(Clone, Debug)]
struct State {
    modules: usize,
    header: Header,
    groups: Vec<Group>,
    sampled: Vec<u32>,
    tokens: Vec<TokenInfo>,
    rows: Vec<u32>,
    /// [sequences][VOCAB]
    seen: Vec<Vec<bool>>,
    drafts: Vec<u32>,
    finished: Vec<u32>,
}

fn words(token: &TokenInfo) -> [u32; 4] {
    [token.id, token.position, token.sequence, token.next]
}

impl State {
    /// What a kernel makes of it. Buffers are larger than the batch, as in a session.
    fn run(&self, kernel: &'static str) -> State {
        let mut variant = Variant::new(kernel).int("MODULES", self.modules).int("WG", MAX_ROWS);
        let Header { tokens, rows, groups, stage, drafts, drafting, .. } = self.header;
        let group = |g: &Group| [g.first_token, g.tokens, g.first_row, g.rows, g.sequence, g.limit, 0, 0];
        let seen = self.seen.iter().flat_map(|seen| {
            seen.chunks(32).map(|bits| bits.iter().rev().fold(0u32, |word, &bit| word << 1 | u32::from(bit)))
        });
        if kernel == "accept" {
            variant = variant.int("MAX_ROWS", MAX_ROWS).int("STEPS", STEPS).int("V", VOCAB);
        }
        let mut call = Call::new(&variant);
        if kernel == "accept" {
            call = call.words("seen", &seen.collect::<Vec<_>>()).words("finished", &self.finished);
        }
        let outputs = call
            .words("batch", &[tokens, rows, groups, stage, drafts, drafting, 0, 0])
            .words("groups", &self.groups.iter().flat_map(group).collect::<Vec<_>>())
            .words("sampled", &self.sampled)
            .words("tokens", &self.tokens.iter().flat_map(words).collect::<Vec<_>>())
            .words("rows", &self.rows)
            .words("drafts", &self.drafts)
            .run([1, 1, 1]);
        let mut after = self.clone();
        let token = |w: &[u32]| TokenInfo { id: w[0], position: w[1], sequence: w[2], next: w[3] };
        after.tokens = outputs.words("tokens").chunks(4).map(token).collect();
        after.rows = outputs.words("rows").to_vec();
        after.drafts = outputs.words("drafts").to_vec();
        if kernel == "accept" {
            after.finished = outputs.words("finished").to_vec();
            let bits = |words: &[u32]| (0..VOCAB).map(|i| words[i / 32] >> (i % 32) & 1 == 1).collect();
            after.seen = outputs.words("seen").chunks(VOCAB.div_ceil(32)).map(bits).collect();
        }
        after
    }

    fn group_tokens(&self, g: usize) -> &[TokenInfo] {
        let Group { first_token, tokens, .. } = self.groups[g];
        &self.tokens[first_token as usize..][..tokens as usize]
    }

    /// Groups that draft.
    fn drafting(&self) -> usize {
        self.header.drafting as usize
    }

    /// What `accept` should make of it.
    fn accepted(&self) -> State {
        let mut after = self.clone();
        let ring = 1 + self.finished[0] as usize % STEPS * MAX_ROWS;
        for (g, group) in self.groups.iter().enumerate() {
            let tokens = self.group_tokens(g);
            let wanted = group.rows as usize;
            // The group's newest token; where it ends, and what follows.
            let (end, follows) = if wanted == 0 {
                (tokens.len(), tokens[tokens.len() - 1].next.saturating_sub(1))
            } else {
                let newest = tokens.len() - wanted;
                let sampled = &self.sampled[group.first_row as usize..][..wanted];
                let good =
                    tokens[newest + 1..].iter().zip(sampled).take_while(|(t, sampled)| t.id == **sampled).count();
                let slots = &mut after.finished[ring + group.first_row as usize..][..wanted];
                for (k, (slot, &id)) in slots.iter_mut().zip(sampled).enumerate() {
                    *slot = if k <= good { id } else { REJECTED };
                    if k <= good && id != POISONED {
                        after.seen[group.sequence as usize][id as usize] = true;
                    }
                }
                let id = if sampled[good] == POISONED { 0 } else { sampled[good] };
                // The newest tokens: those of the batch that stay, then the one that was sampled last.
                let mut known: Vec<u32> = vec![0; self.modules];
                known.extend(tokens[..=newest + good].iter().map(|token| token.id));
                known.push(id);
                let words = &mut after.drafts[g * WORDS..];
                words[0] = tokens[newest].position + good as u32 + 1;
                words[1..=self.modules].copy_from_slice(&known[known.len() - self.modules..]);
                (newest + good + 1, id)
            };
            let (first, row) = (group.first_token as usize, group.first_row as usize);
            if self.header.drafts == 0 {
                if wanted > 0 {
                    let position = tokens[end - 1].position + 1;
                    after.tokens[row] = TokenInfo { id: follows, position, sequence: group.sequence, next: 0 };
                    after.rows[row] = row as u32;
                }
            } else if g < self.drafting() {
                for (i, token) in tokens.iter().enumerate() {
                    let id = if i + 1 < end { tokens[i + 1].id } else { follows };
                    let position = group.limit.min(token.position + 1);
                    after.tokens[first + i] = TokenInfo { id, position, sequence: token.sequence, next: 0 };
                }
                if wanted > 0 {
                    after.rows[g] = (first + end - 1) as u32;
                }
            }
        }
        after.finished[0] = self.finished[0].wrapping_add(u32::from(self.header.rows > 0));
        after
    }

    /// What `propose` should make of it.
    fn proposed(&self) -> State {
        let mut after = self.clone();
        let Header { rows, stage, drafts, .. } = self.header;
        let drafted = |g: usize| if self.sampled[g] == POISONED { 0 } else { self.sampled[g] };
        for g in 0..rows as usize {
            after.drafts[g * WORDS + self.modules + stage as usize] = drafted(g);
        }
        let words = |g: usize| after.drafts[g * WORDS..][..WORDS].to_vec();
        for (g, group) in self.groups.iter().enumerate() {
            let (first, sequence, wanted) = (group.first_token as usize, group.sequence, group.rows as usize);
            if stage == drafts {
                let before = group.tokens as usize - wanted;
                if wanted == 0 || before != 0 && before != self.modules - 1 {
                    continue;
                }
                let words = words(g);
                // History and drafts, one behind the other.
                let ids = &words[1 + self.modules - 1 - before..];
                for (c, &id) in ids[..group.tokens as usize].iter().enumerate() {
                    let position = group.limit.min(words[0] + c as u32 - before as u32);
                    after.tokens[first + c] = TokenInfo { id, position, sequence, next: 0 };
                }
                for k in 0..wanted {
                    after.rows[group.first_row as usize + k] = (first + before + k) as u32;
                }
            } else if (stage as usize) < self.modules && g < self.drafting() {
                let tokens = self.group_tokens(g);
                let wanted_row = if wanted > 0 { self.rows[g] as usize - first } else { tokens.len() };
                for (i, token) in tokens.iter().enumerate() {
                    let id = match tokens.get(i + 1) {
                        _ if i >= wanted_row => drafted(g),
                        Some(behind) => behind.id,
                        None => token.id,
                    };
                    after.tokens[first + i].id = id;
                    after.tokens[first + i].position = group.limit.min(token.position + 1);
                }
            } else if stage as usize >= self.modules && g < rows as usize {
                let position = group.limit.min(words(g)[0] + stage);
                after.tokens[g] = TokenInfo { id: drafted(g), position, sequence, next: 0 };
                after.rows[g] = g as u32;
            }
        }
        after
    }

    #[track_caller]
    fn assert_is(&self, expected: &State, what: &str) {
        let tokens = |state: &State| state.tokens.iter().map(words).collect::<Vec<_>>();
        let differ = tokens(self).into_iter().zip(tokens(expected)).enumerate().find(|(_, (a, b))| a != b);
        assert!(differ.is_none(), "{what}: token {differ:?} of {expected:?}");
        assert_eq!(self.rows, expected.rows, "{what}: rows of {expected:?}");
        assert_eq!(self.drafts, expected.drafts, "{what}: drafts of {expected:?}");
        assert_eq!(self.finished, expected.finished, "{what}: finished of {expected:?}");
        assert_eq!(self.seen, expected.seen, "{what}: seen of {expected:?}");
    }
}

/// A batch of a main model: ragged groups in no order, of which some want rows, and drafts that are partly right.
fn batch(rng: &mut Rng, modules: usize, drafts: usize, finished: u32) -> State {
    let mut groups: Vec<Group> = Vec::new();
    let (mut rows, mut tokens, mut drafting_groups) = (0, 0, 0);
    let most = [1, 3, 9, 64][rng.below(4)];
    let count = 1 + rng.below(most);
    let drafting = if drafts == 0 { 0 } else { 1 + rng.below(count) };
    // Of those that draft, first the ones with rows.
    let wanting = rng.below(drafting + 1);
    let mut sequences = rng.permutation(70);
    for g in 0..count {
        let wants = if g < drafting { g < wanting } else { rng.below(3) > 0 };
        let wanted = match (wants, drafts) {
            (false, _) => 0,
            (true, 0) => 1,
            (true, _) => 1 + rng.below(drafts + 1),
        };
        // Some with the tokens before, some without, and chunks of prompts.
        let before = [0, modules.saturating_sub(1), rng.below(4), rng.below(90)][rng.below(4)];
        let before = if wanted + before == 0 { 1 } else { before };
        if rows + wanted > MAX_ROWS || tokens + wanted + before + count - g > 256 {
            continue;
        }
        let sequence = sequences.pop().expect("one for each") as u32;
        groups.push(Group { tokens: (wanted + before) as u32, rows: wanted as u32, sequence, ..Group::default() });
        rows += wanted;
        tokens += wanted + before;
        drafting_groups += u32::from(g < drafting);
    }
    // Tokens lie in another order than rows.
    let (mut at, mut row) = (0, 0);
    for g in rng.permutation(groups.len()) {
        groups[g].first_token = at;
        at += groups[g].tokens;
    }
    for group in &mut groups {
        group.first_row = row;
        row += group.rows;
    }
    let spare = 5;
    let any = |rng: &mut Rng| TokenInfo { id: 7777, position: rng.below(99) as u32, sequence: 3, next: 5 };
    let mut state = State {
        modules,
        header: Header {
            tokens: tokens as u32,
            rows: rows as u32,
            groups: groups.len() as u32,
            drafts: drafts as u32,
            drafting: drafting_groups,
            ..Header::default()
        },
        sampled: (0..MAX_ROWS).map(|_| rng.below(VOCAB) as u32).collect(),
        tokens: (0..tokens.max(MAX_ROWS) + spare).map(|_| any(rng)).collect(),
        rows: (0..MAX_ROWS).map(|_| rng.below(tokens.max(1)) as u32).collect(),
        seen: (0..70).map(|_| (0..VOCAB).map(|_| rng.below(4) == 0).collect()).collect(),
        drafts: (0..MAX_ROWS * WORDS).map(|_| rng.below(VOCAB) as u32).collect(),
        finished: (0..=STEPS * MAX_ROWS).map(|_| 4444).collect(),
        groups,
    };
    state.finished[0] = finished;
    for group in &mut state.groups {
        let position = rng.below(300) as u32 + modules as u32;
        // Sometimes the pages end soon behind the batch.
        group.limit = position + group.tokens + [0, 1, 3, 5000][rng.below(4)] - 1;
        let newest = group.tokens - group.rows;
        for i in 0..group.tokens {
            let mut id = rng.below(VOCAB) as u32;
            // Most drafts are what was sampled.
            if group.rows > 0 && i > newest && rng.below(4) > 0 {
                id = state.sampled[(group.first_row + i - newest - 1) as usize].min(VOCAB as u32);
            }
            let next = if i + 1 == group.tokens && rng.below(2) == 0 { 1 + rng.below(VOCAB) as u32 } else { 0 };
            state.tokens[(group.first_token + i) as usize] =
                TokenInfo { id, position: position + i, sequence: group.sequence, next };
        }
        for k in 0..group.rows {
            state.rows[(group.first_row + k) as usize] = group.first_token + newest + k;
            if rng.below(25) == 0 {
                state.sampled[(group.first_row + k) as usize] = POISONED;
            }
        }
    }
    state
}

/// A whole cycle, each kernel on what the one before it left: a pass of the main model, then one for each draft.
#[test]
fn cycles_of_ragged_batches() {
    let mut rng = Rng::new(100);
    let (mut accepted, mut rejected, mut poisoned, mut clamped) = (0, 0, 0, 0);
    for case in 0..240 {
        let modules = [1, 2, 3, 8][case % 4];
        let drafts = if case % 5 == 4 { 0 } else { 1 + rng.below(MAX_DRAFTS as usize) };
        let finished = [0, 1, 31, 32, 95, u32::MAX][case % 6];
        let mut state = batch(&mut rng, modules, drafts, finished);
        let what = format!("case {case}: {modules} modules, {drafts} drafts");
        let expected = state.accepted();
        state.run("accept").assert_is(&expected, &format!("{what}, accept"));
        let words = &expected.finished[1 + finished as usize % STEPS * MAX_ROWS..][..MAX_ROWS];
        rejected += words.iter().filter(|&&word| word == REJECTED).count();
        poisoned += words.iter().filter(|&&word| word == POISONED).count();
        let several = state.groups.iter().filter(|group| group.rows > 1).map(|group| group.first_row as usize);
        accepted += several.filter(|&row| words[row + 1] != REJECTED).count();
        state = expected;

        // Passes of modules see the rows of groups that draft alone, and in the end those of one token a group.
        let with_rows = state.groups[..state.drafting()].iter().filter(|group| group.rows > 0).count() as u32;
        for stage in 1..=drafts as u32 {
            let tokens = if stage as usize <= modules { state.header.tokens } else { with_rows };
            state.header = Header { stage, rows: with_rows, tokens, ..state.header };
            state.sampled = (0..MAX_ROWS).map(|_| rng.below(VOCAB) as u32).collect();
            if with_rows > 0 && rng.below(8) == 0 {
                state.sampled[rng.below(with_rows as usize)] = POISONED;
            }
            let expected = state.proposed();
            state.run("propose").assert_is(&expected, &format!("{what}, propose {stage}"));
            state = expected;
        }
        let at_limit =
            |g: usize| state.group_tokens(g).iter().filter(|t| t.position == state.groups[g].limit).count() > 1;
        clamped += (0..state.groups.len()).filter(|&g| drafts > 0 && at_limit(g)).count();
    }
    println!("{accepted} accepted, {rejected} rejected, {poisoned} poisoned, {clamped} at their limit");
    assert!(accepted > 100 && rejected > 100 && poisoned > 10 && clamped > 10);
}

/// One sequence, two modules, three drafts, in numbers that can be followed by hand.
#[test]
fn one_sequence_by_hand() {
    let token = |id, position| TokenInfo { id, position, sequence: 2, next: 0 };
    let mut state = State {
        modules: 2,
        header: Header { tokens: 5, rows: 4, groups: 1, stage: 0, drafts: 3, drafting: 1, ..Header::default() },
        groups: vec![Group { tokens: 5, rows: 4, sequence: 2, limit: 500, ..Group::default() }],
        // The token before, the newest (position 10), three drafts; the first two are right.
        tokens: vec![token(40, 9), token(41, 10), token(42, 11), token(43, 12), token(99, 13)],
        sampled: vec![42, 43, 44, 50],
        rows: vec![1, 2, 3, 4],
        seen: vec![vec![false; VOCAB]; 3],
        drafts: vec![9; MAX_ROWS * WORDS],
        finished: vec![0; 1 + STEPS * MAX_ROWS],
    };
    state = state.run("accept");
    assert_eq!(state.finished[..6], [1, 42, 43, 44, REJECTED, 0]);
    let seen: Vec<usize> = (0..VOCAB).filter(|&id| state.seen[2][id]).collect();
    assert_eq!(seen, [42, 43, 44]);
    assert_eq!(state.drafts[..4], [13, 43, 44, 9]);
    // Module 1: each row one further; the newest token, 44, is at position 13 in row 3.
    assert_eq!(state.tokens[..4], [token(41, 10), token(42, 11), token(43, 12), token(44, 13)]);
    assert_eq!(state.rows[0], 3);

    state.header = Header { stage: 1, rows: 1, ..state.header };
    state.sampled[0] = 45;
    state = state.run("propose");
    // Module 2: the draft is at position 14.
    assert_eq!(state.tokens[..4], [token(42, 11), token(43, 12), token(44, 13), token(45, 14)]);
    assert_eq!((state.rows[0], state.drafts[3]), (3, 45));

    state.header.stage = 2;
    state.sampled[0] = 46;
    state = state.run("propose");
    // Module 2 again, for one row.
    assert_eq!((state.tokens[0], state.rows[0]), (token(46, 15), 0));

    state.header = Header { stage: 3, tokens: 1, ..state.header };
    state.sampled[0] = 47;
    state = state.run("propose");
    assert_eq!(state.tokens, [token(43, 12), token(44, 13), token(45, 14), token(46, 15), token(47, 16)]);
    assert_eq!(state.rows[..4], [1, 2, 3, 4]);
}

/// Decoding without drafts: sampled tokens are fed back, step after step, and the ring goes round.
#[test]
fn sampled_tokens_become_the_next_batch() {
    let mut rng = Rng::new(101);
    for count in [1, 7, 64] {
        let token = |g: u32| TokenInfo { id: 10, position: 3 * g, sequence: g, next: 4 };
        let mut state = State {
            modules: 0,
            header: Header { tokens: count, rows: count, groups: count, ..Header::default() },
            groups: (0..count)
                .map(|g| Group { first_token: g, tokens: 1, first_row: g, rows: 1, sequence: g, ..Group::default() })
                .collect(),
            tokens: (0..count).map(token).collect(),
            rows: (0..count).collect(),
            sampled: Vec::new(),
            seen: vec![vec![false; VOCAB]; count as usize],
            drafts: vec![9; MAX_ROWS * WORDS],
            finished: vec![0; 1 + STEPS * MAX_ROWS],
        };
        for step in 0..40u32 {
            state.sampled = (0..count).map(|_| rng.below(VOCAB) as u32).collect();
            let next = state.run("accept");
            next.assert_is(&state.accepted(), &format!("{count} rows, step {step}"));
            for (g, token) in (0..).zip(&next.tokens) {
                let id = state.sampled[g as usize];
                assert_eq!(*token, TokenInfo { id, position: 3 * g + step + 1, sequence: g, next: 0 });
            }
            state = next;
        }
        assert_eq!(state.finished[0], 40);
    }
}
