//! One step of many sequences: a batch in which some decode and others have a part of their prompt run, with what modules
//! of multi-token prediction draft behind it. Drafting, verifying and accepting stay on the device; the host reads the
//! accepted tokens of all passes at the end.
//!
//! Drafts never change what is generated. The sampler's draw depends on seed, position and logits alone, a pass of the
//! main model draws a token behind the newest one and behind each draft, and a draft counts only if it is the very token
//! that was drawn in its place (spec §7).

use std::sync::Arc;

use moewe_plan::{
    DRAFT_WORDS, FINISHED_STEPS, Group, Header, LOGPROB_TOP, LOGPROB_WORDS, MAX_DRAFT_MODULES, MAX_DRAFTS, POISONED,
    ProgramKind, REJECTED, Role, Step,
};

use crate::decode::{MAX_BURST, distinct, first_word};
use crate::session::LastRun;
use crate::{Batch, Error, Result, SequenceId, Session};

/// What a step does for one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// The sequence.
    pub sequence: SequenceId,
    /// How many of its tokens are run that were not run yet. If none is left behind them, the next token is drawn.
    pub tokens: usize,
    /// Tokens to draft behind it, for the next pass to verify; at most [`MAX_DRAFTS`]. Of those that were drafted before,
    /// no more than this are verified. A sequence that is to draft later
    /// says so while its prompt is run, too: otherwise the modules know nothing of the prompt.
    pub drafts: u32,
    /// Whether the log probabilities of its tokens are wanted.
    pub logprobs: bool,
}

/// What a step brought a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stepped {
    /// Passes that were made.
    pub passes: u32,
    /// The tokens that were drawn.
    pub tokens: Vec<u32>,
    /// The log probabilities of each of them, if they were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// For each pass with drafts to verify: how many there were, and how many of them were accepted.
    pub verified: Vec<(u32, u32)>,
    /// Whether the last draw failed, since no logit was a number. The sequence has ended then.
    pub poisoned: bool,
}

/// Natural logarithms of probabilities that the logits gave to tokens where one was drawn: softmax over the vocabulary, of
/// the logits as the model made them, without bias, mask, penalty and temperature. Finite, whatever the logits are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was drawn.
    pub logprob: f32,
    /// Of the likeliest tokens, best first, ties to the lowest id: [`LOGPROB_TOP`], or all if there are fewer.
    pub top: Vec<(u32, f32)>,
}

/// The batch of a step.
struct Laid {
    /// The program that runs it.
    kind: ProgramKind,
    batch: Batch,
    groups: Vec<Group>,
    /// For each group, whose it is (index into the caller's list).
    owners: Vec<usize>,
    /// Groups that take part in drafting, tokens of these groups, and those of them whose next token is drawn.
    drafting: usize,
    drafting_tokens: usize,
    drafting_rows: usize,
    /// Drafts that are made.
    stages: u32,
    /// Whether log probabilities are wanted of any sequence.
    logprobs: bool,
}

/// What the passes of a step left on the device.
#[derive(Default)]
struct Brought {
    /// The ring of finished tokens, and the words of each of its rows.
    ring: Vec<u32>,
    stride: usize,
    /// What was drafted behind each group.
    drafts: Vec<u32>,
    /// For each pass and wanted row the words of its log probabilities, if they were asked for.
    logprobs: Vec<u32>,
}

impl Session {
    /// Runs one batch, and up to `steps` (at most [`MAX_BURST`]) passes over it where every sequence decodes: then each
    /// pass feeds the next on the device. Batches with parts of prompts, or with another number of drafts to verify than
    /// to make, are passed once; the caller goes on. Returns what happened to each sequence, in the order of `work`.
    ///
    /// A sequence whose draw failed is told apart ([`Stepped::poisoned`]); the others are not concerned. Drafts of a
    /// sequence are left out where it has no room for them.
    ///
    /// While taps are read ([`Session::set_watch`]) or parameters changed, each pass is watched and gives a frame, which is
    /// ready when this returns; nothing is drafted or verified then.
    ///
    /// # Errors
    /// Among others [`Error::OutOfPages`] if the caller did not see to it ([`Session::ensure`]) that there are enough
    /// pages for one token more of each sequence and pass; nothing has happened then.
    pub fn step(&mut self, work: &[Work], steps: u32) -> Result<Vec<Stepped>> {
        distinct(&work.iter().map(|work| work.sequence).collect::<Vec<_>>())?;
        if steps == 0 || steps > MAX_BURST {
            return Err(Error::Batch { what: format!("{steps} steps, 1 to {MAX_BURST} are possible") });
        }
        self.model.gpu().check_stop()?;
        let kind = self.forward_kind();
        let drafts = self.drafts_of(work, kind)?;
        let mut steps = if self.repeats(work, &drafts)? { steps } else { 1 };
        while let Err(error) = self.reserve(work, &drafts, steps) {
            // Near the end of the context, or of the pages, passes are made one by one.
            if steps == 1 {
                return Err(error);
            }
            steps = 1;
        }
        let laid = self.lay(work, &drafts, kind)?;
        let first = self.finished;
        let ran = self.run_step(&laid, steps);
        let stepped = ran.and_then(|main| self.collect_step(work, &laid, &drafts, main, first, steps));
        if stepped.is_err() {
            // Some passes may have been made: the device has seen tokens that nobody was told of.
            self.slots.all_changed();
        }
        stepped
    }

    /// Most tokens, and most wanted rows and sequences, of a step, whether it is watched or not.
    pub(crate) fn step_capacity(&self) -> Result<(usize, usize)> {
        let (mut tokens, mut rows) = self.capacity(self.forward_kind())?;
        let mains = [ProgramKind::Forward, ProgramKind::Watch];
        let mains = mains.into_iter().filter(|kind| self.options.kinds.contains(kind));
        let modules = (1..=self.draft_modules()).map(|module| ProgramKind::Draft { module });
        for kind in mains.chain(modules) {
            let (other_tokens, other_rows) = self.capacity(kind)?;
            (tokens, rows) = (tokens.min(other_tokens), rows.min(other_rows));
        }
        Ok((tokens, rows))
    }

    /// Modules of multi-token prediction that draft in this session.
    pub(crate) fn draft_modules(&self) -> u32 {
        let modules = self.model.plan().model.mtp_modules;
        let has = |module| self.options.kinds.contains(&ProgramKind::Draft { module });
        if modules <= MAX_DRAFT_MODULES.min(MAX_DRAFTS) && modules > 0 && (1..=modules).all(has) { modules } else { 0 }
    }

    /// Drafts that each sequence makes: those asked for, or none if there is no room behind its tokens, or if this kind of
    /// program cannot be followed by drafts. Of those to be verified, the ones that cannot be are forgotten.
    fn drafts_of(&mut self, work: &[Work], kind: ProgramKind) -> Result<Vec<u32>> {
        let modules = if kind == ProgramKind::Forward { self.draft_modules() } else { 0 };
        let max_context = self.model.plan().model.max_context as usize;
        let mut drafts = Vec::with_capacity(work.len());
        for work in work {
            let sequence = self.slots.get_mut(work.sequence)?;
            let pending = sequence.tokens.len() - sequence.cached;
            if work.tokens == 0 || work.tokens > pending {
                let expected = "at least as many as are to be run, and one,";
                return Err(Error::Pending { slot: work.sequence.slot(), pending, expected });
            }
            let room = max_context.saturating_sub(sequence.cached + work.tokens);
            let verified = if kind == ProgramKind::Forward { work.drafts as usize } else { 0 };
            sequence.drafts.truncate(room.min(verified));
            let wanted = if modules > 0 { work.drafts.min(MAX_DRAFTS) } else { 0 };
            // A module's row stands further than the main model's by the module's number.
            let stages = if wanted > 0 { wanted.max(modules) } else { 0 };
            let end = sequence.cached + work.tokens + sequence.drafts.len() + (stages + modules) as usize;
            let fits = wanted > 0 && self.ensure(work.sequence, end).is_ok();
            drafts.push(if fits { wanted } else { 0 });
        }
        Ok(drafts)
    }

    /// Whether the batch has the form that it leaves behind, so that it can be passed several times over.
    fn repeats(&self, work: &[Work], drafts: &[u32]) -> Result<bool> {
        let lead = self.draft_modules().saturating_sub(1) as usize;
        for (work, &drafts) in work.iter().zip(drafts) {
            let sequence = self.slots.get(work.sequence)?;
            let decodes = sequence.tokens.len() - sequence.cached == 1;
            let same = sequence.drafts.len() == drafts as usize && (drafts == 0 || sequence.cached >= lead);
            if !decodes || !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Pages for all that the passes may come to.
    fn reserve(&mut self, work: &[Work], drafts: &[u32], steps: u32) -> Result<()> {
        let mut wanted = Vec::with_capacity(work.len());
        for (work, &drafts) in work.iter().zip(drafts) {
            let sequence = self.slots.get(work.sequence)?;
            let pass = 1 + sequence.drafts.len();
            let end = sequence.cached + work.tokens + sequence.drafts.len() + (steps as usize - 1) * pass;
            let behind = if drafts > 0 { drafts.max(self.draft_modules()) + self.draft_modules() } else { 0 };
            wanted.push((work.sequence, end + behind as usize));
        }
        self.ensure_all(&wanted)
    }

    /// Puts the batch together: sequences that draft first, those of them that draw a token before the others.
    fn lay(&mut self, work: &[Work], drafts: &[u32], kind: ProgramKind) -> Result<Laid> {
        let modules = self.draft_modules();
        let mut order = Vec::with_capacity(work.len());
        for (index, work) in work.iter().enumerate() {
            let sequence = self.slots.get(work.sequence)?;
            let draws = sequence.cached + work.tokens == sequence.tokens.len();
            order.push((drafts[index] == 0, !draws, index));
        }
        order.sort_unstable();
        let mut laid = Laid {
            kind,
            batch: Batch::default(),
            groups: Vec::new(),
            owners: Vec::new(),
            drafting: 0,
            drafting_tokens: 0,
            drafting_rows: 0,
            stages: 0,
            logprobs: work.iter().any(|work| work.logprobs),
        };
        for (_, not_drawing, index) in order {
            let (id, count, drafts) = (work[index].sequence, work[index].tokens, drafts[index]);
            let sequence = self.slots.get_mut(id)?;
            // Rows of modules behind the first may rest on drafts that were rejected: they are made again.
            let lead = if drafts > 0 { sequence.cached.min(modules as usize - 1) } else { 0 };
            if drafts > 0 {
                sequence.begin_drafting(modules);
            }
            let draws = !not_drawing;
            let verified = if draws { sequence.drafts.len() } else { 0 };
            let from = sequence.cached - lead;
            let mut ids = sequence.tokens[from..sequence.cached + count].to_vec();
            ids.extend(&sequence.drafts[..verified]);
            let mut tokens = Batch::of(id, &ids, from as u32).tokens;
            if let (Some(last), Some(next)) = (tokens.last_mut(), sequence.tokens.get(sequence.cached + count)) {
                last.next = next + 1;
            }
            let group = Group {
                first_token: laid.batch.tokens.len() as u32,
                tokens: tokens.len() as u32,
                first_row: laid.batch.rows.len() as u32,
                rows: if draws { 1 + verified as u32 } else { 0 },
                sequence: id.slot(),
                limit: (sequence.pages.len() * moewe_plan::PAGE_TOKENS as usize) as u32 - 1,
                ..Group::default()
            };
            laid.batch.tokens.extend(tokens);
            let end = group.first_token + group.tokens;
            laid.batch.rows.extend(end - group.rows..end);
            if drafts > 0 {
                laid.drafting += 1;
                laid.drafting_tokens += group.tokens as usize;
                laid.drafting_rows += usize::from(draws);
                // Every module sees every row, whether its draft is wanted or not: it may be, later.
                laid.stages = laid.stages.max(modules).max(if draws { drafts } else { 0 });
            }
            laid.groups.push(group);
            laid.owners.push(index);
        }
        Ok(laid)
    }

    /// Submits all passes. Returns the run of the main model.
    fn run_step(&mut self, laid: &Laid, steps: u32) -> Result<LastRun> {
        let main = self.select(laid.kind, laid.batch.tokens.len(), &laid.batch.rows)?;
        let groups = laid.groups.len();
        let max_groups = self.stride(main);
        if groups > max_groups {
            return Err(Error::Batch { what: format!("{groups} sequences, at most {max_groups} are possible") });
        }
        let modules = self.draft_modules();
        let mut drafts = Vec::new();
        for stage in 1..=laid.stages {
            // All rows go through each module once, then those of the newest drafts alone through the last one.
            let (module, tokens) = (stage.min(modules), laid.drafting_tokens);
            let tokens = if stage > modules { laid.drafting_rows } else { tokens };
            if tokens == 0 {
                break;
            }
            let rows: Vec<u32> = (0..laid.drafting_rows as u32).collect();
            drafts.push((self.select(ProgramKind::Draft { module }, tokens, &rows)?, tokens));
        }
        let stages = drafts.len() as u32;
        let header = |stage: u32, tokens: usize, rows: usize| Header {
            tokens: tokens as u32,
            rows: rows as u32,
            groups: groups as u32,
            stage,
            drafts: stages,
            drafting: laid.drafting as u32,
            ..Header::default()
        };
        let mut headers = vec![header(0, laid.batch.tokens.len(), laid.batch.rows.len())];
        headers.extend((1..).zip(&drafts).map(|(stage, &(_, tokens))| header(stage, tokens, laid.drafting_rows)));

        let runs = |step: &Step| step.only_for.is_empty() && step.when.holds(stages > 0, laid.logprobs);
        let main_grids = self.grids(main, &runs)?;
        let mut draft_grids = Vec::with_capacity(drafts.len());
        for &(run, _) in &drafts {
            draft_grids.push(self.grids(run, &runs)?);
        }
        let watched = if laid.kind == ProgramKind::Watch {
            let rows = self.frame_tokens(&laid.batch.tokens)?;
            Some(self.watched(main, rows, laid.logprobs)?)
        } else {
            None
        };
        let gpu = Arc::clone(self.model.gpu());
        let written = gpu.scoped(|| {
            self.upload_sequences();
            self.clear_joints(laid);
            self.write_batch(&headers[0], &laid.groups, &laid.batch);
            let words: Vec<u32> = headers.iter().flat_map(Header::words).collect();
            gpu.queue.write_buffer(&self.headers.raw, 0, bytemuck::cast_slice(&words));
        });
        written.map_err(|error| gpu.refused("a batch", &error))?;
        let target = self.buffers.role(Role::Header).map(|header| header.raw.clone());
        let target = target.ok_or_else(|| Error::Plan { what: "its forward programs have no header".into() })?;
        let source = self.headers.raw.clone();
        for pass in 0..steps {
            let mut encoder = gpu.encoder("step");
            let header = |encoder: &mut wgpu::CommandEncoder, stage: usize| {
                encoder.copy_buffer_to_buffer(&source, stage as u64 * 32, &target, 0, 32);
            };
            if pass > 0 && stages > 0 {
                header(&mut encoder, 0);
            }
            if let Some(watched) = &watched {
                self.record_watched(watched, &mut encoder, pass);
            } else {
                self.prepared(main).record(&mut encoder, &main_grids, 1);
                self.count(main, 1);
                self.last = None;
            }
            for (index, (&(run, _), grids)) in drafts.iter().zip(&draft_grids).enumerate() {
                header(&mut encoder, index + 1);
                self.prepared(run).record(&mut encoder, grids, 1);
            }
            self.submit(encoder)?;
        }
        Ok(main)
    }

    /// Reads what all passes brought, and brings the sequences up to date.
    fn collect_step(
        &mut self,
        work: &[Work],
        laid: &Laid,
        drafts: &[u32],
        main: LastRun,
        first: u32,
        steps: u32,
    ) -> Result<Vec<Stepped>> {
        let mut stepped = vec![Stepped { passes: steps, ..Stepped::default() }; work.len()];
        let brought = self.brought(laid, self.stride(main), first, steps)?;
        let modules = self.draft_modules() as usize;
        for (index, (group, &owner)) in laid.groups.iter().zip(&laid.owners).enumerate() {
            let id = work[owner].sequence;
            let result = &mut stepped[owner];
            let verified = group.rows.saturating_sub(1);
            for pass in 0..if group.rows > 0 { steps } else { 0 } {
                let at = first_word(first.wrapping_add(pass), brought.stride) + group.first_row as usize;
                let row = &brought.ring[at..at + group.rows as usize];
                let before = result.tokens.len();
                for &token in row.iter().take_while(|&&token| token != REJECTED) {
                    if token == POISONED {
                        result.poisoned = true;
                        break;
                    }
                    result.tokens.push(self.check_token(token)?);
                }
                if result.poisoned {
                    break;
                }
                if result.tokens.len() == before {
                    return Err(Error::Plan { what: "its forward programs drew no token".into() });
                }
                if work[owner].logprobs {
                    let first = pass as usize * laid.batch.rows.len() + group.first_row as usize;
                    for row in first..first + result.tokens.len() - before {
                        result.logprobs.push(self.row_logprobs(&brought.logprobs, row)?);
                    }
                }
                if verified > 0 {
                    result.verified.push((verified, (result.tokens.len() - before - 1) as u32));
                }
            }
            let sequence = self.slots.get_mut(id)?;
            sequence.drafts.clear();
            if group.rows > 0 {
                sequence.tokens.extend(&result.tokens);
                // Where a draw failed, the latents of the last token may be no numbers.
                sequence.cached = sequence.tokens.len() - 1;
                if drafts[owner] > 0 && !result.poisoned {
                    let made = &brought.drafts[index * DRAFT_WORDS as usize + 1 + modules..][..drafts[owner] as usize];
                    let vocab_size = self.model.plan().model.vocab_size;
                    // A draft that is none cannot be accepted, but must not be looked up either.
                    sequence.drafts = made.iter().map(|&id| if id < vocab_size { id } else { 0 }).collect();
                }
            } else {
                sequence.cached += work[owner].tokens;
            }
            if drafts[owner] > 0 {
                sequence.module_cache.end = sequence.cached;
            }
            sequence.drafted = false;
        }
        if laid.batch.rows.is_empty() {
            // Uploads in flight must not grow without bound.
            self.model.gpu().wait()?;
        }
        Ok(stepped)
    }

    /// Waits for the passes and reads what they left. `first` is the number of the first pass.
    fn brought(&self, laid: &Laid, stride: usize, first: u32, steps: u32) -> Result<Brought> {
        if laid.batch.rows.is_empty() {
            return Ok(Brought::default());
        }
        let mut sources: Vec<_> =
            self.buffers.role(Role::Drafts).map(|drafts| (drafts, 0, drafts.bytes())).into_iter().collect();
        let with_drafts = !sources.is_empty();
        if laid.logprobs {
            let Some(logprobs) = self.buffers.role(Role::Logprobs) else {
                return Err(Error::Plan { what: "its forward programs have no buffer of log probabilities".into() });
            };
            let row = u64::from(LOGPROB_WORDS) * 4;
            for pass in 0..steps {
                let entry = u64::from(first.wrapping_add(pass) % FINISHED_STEPS);
                sources.push((logprobs, entry * stride as u64 * row, laid.batch.rows.len() as u64 * row));
            }
        }
        let mut parts = self.ring_with(&sources)?.into_iter();
        let mut part = || parts.next().unwrap_or_default();
        let (ring, drafts) = (part(), if with_drafts { part() } else { Vec::new() });
        Ok(Brought { ring, stride, drafts, logprobs: parts.flatten().collect() })
    }

    /// The log probabilities in a row of what was read.
    fn row_logprobs(&self, words: &[u32], row: usize) -> Result<TokenLogprobs> {
        let words = &words[row * LOGPROB_WORDS as usize..][..LOGPROB_WORDS as usize];
        let (ids, numbers) = words[2..].split_at(LOGPROB_TOP as usize);
        let mut top = Vec::with_capacity(ids.len());
        for (&id, &number) in ids.iter().zip(numbers).take_while(|(id, _)| **id != u32::MAX) {
            top.push((self.check_token(id)?, f32::from_bits(number)));
        }
        Ok(TokenLogprobs { logprob: f32::from_bits(words[0]), top })
    }

    /// Clears the rows of modules for which there is nothing to compute them from.
    fn clear_joints(&mut self, laid: &Laid) {
        let modules = self.draft_modules() as usize;
        for group in &laid.groups[..laid.drafting] {
            let sequence = self.slots.by_slot(group.sequence).and_then(|id| self.slots.get_mut(id));
            let Ok(sequence) = sequence else { continue };
            let Some(joint) = sequence.module_cache.joint.take() else { continue };
            let pages = sequence.pages.clone();
            for position in joint..joint + modules {
                if let Some(&page) = pages.get(position / moewe_plan::PAGE_TOKENS as usize) {
                    self.clear_row(page, position % moewe_plan::PAGE_TOKENS as usize);
                }
            }
        }
    }
}
