//! A session: the state of running sequences, and single runs of a program.

use std::sync::Arc;

use moewe_plan::{Group, Header, MAX_DRAFTS, Precision, Program, ProgramKind, Role, Step, Symbols, TokenInfo};

use wgpu::BufferUsages;

use crate::buffers::Buffers;
use crate::memory::Buffer;
use crate::pages::Pages;
use crate::record::{Grids, Prepared, grids};
use crate::sequences::{SequenceId, Slots};
use crate::watch::Watching;
use crate::{Error, Model, Result, Watch};

/// What a session is to hold.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// How activations and latents are kept.
    pub precision: Precision,
    /// The programs that it may run.
    pub kinds: Vec<ProgramKind>,
    /// Sequences at once.
    pub max_sequences: u32,
    /// Pages of the latent cache. Without it: enough for the longest context of every sequence, as far as the
    /// largest binding and `cache_bytes` allow.
    pub pages: Option<u32>,
    /// Bytes of the latent cache where `pages` is not said; 4 GiB without it, on a software driver at most half
    /// of the free memory.
    pub cache_bytes: Option<u64>,
    /// Reads taps while sequences run, which needs [`ProgramKind::Watch`] among `kinds` (and the first draft, if drafts
    /// are to be watched, too).
    pub watch: Option<Watch>,
}

impl Default for SessionOptions {
    /// One sequence, exact, forward only.
    fn default() -> Self {
        Self {
            precision: Precision::Exact,
            kinds: vec![ProgramKind::Forward],
            max_sequences: 1,
            pages: None,
            cache_bytes: None,
            watch: None,
        }
    }
}

/// Tokens for one run of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The tokens, of one or several sequences.
    pub tokens: Vec<TokenInfo>,
    /// Indices into `tokens` whose logits are wanted.
    pub rows: Vec<u32>,
}

impl Batch {
    /// Tokens of one sequence from a position on, without rows. Each knows the one behind it; the last does not.
    pub fn of(sequence: SequenceId, ids: &[u32], first_position: u32) -> Self {
        let token = |(index, (position, &id)): (usize, (u32, &u32))| {
            let next = ids.get(index + 1).map_or(0, |next| next.saturating_add(1));
            TokenInfo { id, position, sequence: sequence.slot(), next }
        };
        Self { tokens: (first_position..).zip(ids).enumerate().map(token).collect(), rows: Vec::new() }
    }

    /// The tokens of each sequence, where they stand behind one another. Rows count as the group's if they are in order.
    fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (index, token) in (0..).zip(&self.tokens) {
            match groups.last_mut().filter(|group| group.sequence == token.sequence) {
                Some(group) => group.tokens += 1,
                None => groups.push(Group {
                    first_token: index,
                    tokens: 1,
                    sequence: token.sequence,
                    limit: u32::MAX,
                    ..Group::default()
                }),
            }
        }
        for group in &mut groups {
            let own = |row: &u32| (group.first_token..group.first_token + group.tokens).contains(row);
            group.first_row = self.rows.iter().position(own).unwrap_or(0) as u32;
            group.rows = self.rows.iter().filter(|row| own(row)).count() as u32;
        }
        groups
    }

    /// Asks for the logits of every token.
    #[must_use]
    pub fn with_all_rows(mut self) -> Self {
        self.rows = (0..self.tokens.len() as u32).collect();
        self
    }

    /// Asks for the logits of the last token.
    #[must_use]
    pub fn with_last_row(mut self) -> Self {
        self.rows = (self.tokens.len() as u32).checked_sub(1).into_iter().collect();
        self
    }
}

/// The run whose results lie in the buffers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LastRun {
    pub(crate) program: usize,
    pub(crate) symbols: Symbols,
    /// Whether every token is a wanted row, in their order, as when decoding.
    pub(crate) all_rows: bool,
}

/// Running sequences of a model: caches, activations, bind groups.
#[derive(Debug)]
pub struct Session {
    pub(crate) model: Arc<Model>,
    pub(crate) options: SessionOptions,
    pub(crate) buffers: Buffers,
    prepared: Vec<Option<Prepared>>,
    pub(crate) slots: Slots,
    pub(crate) pages: Pages,
    /// Runs that the device has counted in the ring of finished tokens.
    pub(crate) finished: u32,
    /// The run whose taps can be read: the last one, if no step was left out.
    pub(crate) last: Option<LastRun>,
    /// Whether any parameter differs from what changes nothing.
    pub(crate) edited: bool,
    pub(crate) watching: Option<Watching>,
    /// The headers of a step's passes, from where they are copied as the passes come.
    pub(crate) headers: Buffer,
}

impl Session {
    /// Allocates caches and activations, all zeros, and makes the pipelines that are missing.
    pub fn new(model: Arc<Model>, options: SessionOptions) -> Result<Self> {
        if options.watch.is_some() && !options.kinds.contains(&ProgramKind::Watch) {
            return Err(Error::NotPrepared { kind: ProgramKind::Watch, place: "session" });
        }
        model.prepare(&options.kinds, options.precision, &|_| ())?;
        let plan = model.plan();
        let programs: Vec<&Program> =
            options.kinds.iter().flat_map(|&kind| model.programs(kind, options.precision)).map(|(_, p)| p).collect();
        let buffers = Buffers::new(model.gpu(), plan, &programs, &options)?;
        let mut prepared: Vec<Option<Prepared>> = plan.programs.iter().map(|_| None).collect();
        for (index, program) in options.kinds.iter().flat_map(|&kind| model.programs(kind, options.precision)) {
            prepared[index] = Some(Prepared::new(&model, &buffers, program)?);
        }
        let pages = Pages::new(buffers.capacity.pages as u32);
        let slots = Slots::new(buffers.capacity.sequences as u32);
        let watching = options.watch.as_ref().map(|watch| Watching::new(&model, &options, watch));
        let (finished, last, edited) = (0, None, false);
        let header_bytes = u64::from(MAX_DRAFTS + 1) * size_of::<Header>() as u64;
        let headers = model.gpu().buffer("headers", header_bytes, BufferUsages::COPY_SRC | BufferUsages::COPY_DST)?;
        let session =
            Self { model, options, buffers, prepared, slots, pages, finished, last, edited, watching, headers };
        session.write_parameters(&session.neutral_parameters())?;
        Ok(session)
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// What it was made for.
    pub fn options(&self) -> &SessionOptions {
        &self.options
    }

    /// Tokens and logits rows that one run of a program of this kind takes at most.
    pub fn capacity(&self, kind: ProgramKind) -> Result<(usize, usize)> {
        let (_, program) = self.kinds_programs(kind)?.pop().expect("the model prepared this kind");
        let (tokens, rows) = self.capacity_of(program);
        Ok((tokens as usize, rows as usize))
    }

    /// Pages of the latent cache, and how many of them are free.
    pub fn pages(&self) -> (usize, usize) {
        (self.pages.total(), self.pages.free())
    }

    /// Positions that one sequence can fill if it is alone: the model's context, or less if the cache is smaller.
    pub fn max_context(&self) -> usize {
        (self.model.plan().model.max_context as usize).min(self.pages.total() * moewe_plan::PAGE_TOKENS as usize)
    }

    /// Runs a program of this kind once over a batch: the smallest one that takes it. Pages are allocated as needed.
    /// Tokens of the sequences themselves are left as they are.
    pub fn run(&mut self, kind: ProgramKind, batch: &Batch) -> Result<()> {
        self.check_batch(batch)?;
        for token in &batch.tokens {
            let sequence = self.slots.by_slot(token.sequence)?;
            self.ensure(sequence, token.position as usize + 1)?;
        }
        let run = self.start(kind, batch)?;
        let mut encoder = self.model.gpu().encoder("run");
        self.record(run, &mut encoder, 1)?;
        self.submit(encoder)
    }

    fn check_batch(&self, batch: &Batch) -> Result<()> {
        let info = &self.model.plan().model;
        let wrong = |what: String| Err(Error::Batch { what });
        if batch.tokens.is_empty() {
            return wrong("no tokens".into());
        }
        for (index, token) in batch.tokens.iter().enumerate() {
            if token.id >= info.vocab_size {
                return Err(Error::TokenOutOfVocabulary { index, token: token.id, vocab_size: info.vocab_size });
            }
            if token.next > info.vocab_size {
                return wrong(format!("token {index} is followed by {}, plus one", token.next));
            }
            if token.position >= info.max_context {
                let (tokens, max_context) = (token.position as usize + 1, info.max_context as usize);
                return Err(Error::ContextExceeded { tokens, max_context });
            }
        }
        match batch.rows.iter().find(|&&row| row as usize >= batch.tokens.len()) {
            Some(row) => wrong(format!("row {row} of {} tokens", batch.tokens.len())),
            None => Ok(()),
        }
    }

    fn kinds_programs(&self, kind: ProgramKind) -> Result<Vec<(usize, &Program)>> {
        if !self.options.kinds.contains(&kind) {
            return Err(Error::NotPrepared { kind, place: "session" });
        }
        Ok(self.model.programs(kind, self.options.precision))
    }

    /// What a program takes, given the buffers as they are.
    fn capacity_of(&self, program: &Program) -> (u64, u64) {
        let capacity = &self.buffers.capacity;
        (capacity.tokens.min(program.max_tokens.into()), capacity.rows.min(program.max_rows.into()))
    }

    /// The smallest program of a kind that takes so many tokens and rows.
    fn choose(&self, kind: ProgramKind, tokens: usize, rows: usize) -> Result<usize> {
        let programs = self.kinds_programs(kind)?;
        let fits = |program: &Program| {
            let (max_tokens, max_rows) = self.capacity_of(program);
            tokens as u64 <= max_tokens && rows as u64 <= max_rows
        };
        if let Some((index, _)) = programs.iter().find(|(_, program)| fits(program)) {
            return Ok(*index);
        }
        let (_, largest) = programs.last().expect("the model prepared this kind");
        let (max_tokens, max_rows) = self.capacity_of(largest);
        Err(Error::BatchTooLarge { kind, tokens, rows, max_tokens, max_rows })
    }

    /// The run of the smallest program that takes so many tokens and these rows, ready to be recorded.
    pub(crate) fn select(&self, kind: ProgramKind, tokens: usize, rows: &[u32]) -> Result<LastRun> {
        let all_rows = rows.iter().copied().eq(0..tokens as u32);
        let rows = rows.len();
        let program = self.choose(kind, tokens, rows)?;
        let symbols = Symbols { tokens: tokens as u64, rows: rows as u64, ..self.buffers.capacity };
        Ok(LastRun { program, symbols, all_rows })
    }

    /// Uploads a batch and whatever of its sequences changed, and says what to record.
    pub(crate) fn start(&mut self, kind: ProgramKind, batch: &Batch) -> Result<LastRun> {
        let run = self.select(kind, batch.tokens.len(), &batch.rows)?;
        let gpu = Arc::clone(self.model.gpu());
        let groups = batch.groups();
        let written = gpu.scoped(|| {
            let (tokens, rows) = (batch.tokens.len() as u32, batch.rows.len() as u32);
            let header = Header { tokens, rows, groups: groups.len() as u32, ..Header::default() };
            self.write_batch(&header, &groups, batch);
            self.upload_sequences();
        });
        written.map_err(|error| {
            self.slots.all_changed();
            gpu.refused("a batch", &error)
        })?;
        Ok(run)
    }

    /// Writes what a pass of the main model reads of its batch.
    pub(crate) fn write_batch(&self, header: &Header, groups: &[Group], batch: &Batch) {
        self.write(Role::Header, 0, &header.words());
        self.write(Role::Groups, 0, groups.iter().flat_map(Group::words).collect::<Vec<u32>>().as_slice());
        let words = batch.tokens.iter().flat_map(|token| [token.id, token.position, token.sequence, token.next]);
        self.write(Role::Tokens, 0, &words.collect::<Vec<u32>>());
        self.write(Role::Rows, 0, &batch.rows);
    }

    /// Workgroups of a run's steps, as far as they are wanted.
    pub(crate) fn grids(&self, run: LastRun, wanted: &dyn Fn(&Step) -> bool) -> Result<Grids> {
        let program = &self.model.plan().programs[run.program];
        grids(program, &run.symbols, self.model.gpu().limits.max_compute_workgroups_per_dimension, wanted)
    }

    pub(crate) fn prepared(&self, run: LastRun) -> &Prepared {
        self.prepared[run.program].as_ref().expect("the session prepared its programs")
    }

    /// Counts runs whose sampled tokens the device counts.
    pub(crate) fn count(&mut self, run: LastRun, runs: u32) {
        let kind = self.model.plan().programs[run.program].kind;
        if matches!(kind, ProgramKind::Forward | ProgramKind::Watch) && run.symbols.rows > 0 {
            self.finished = self.finished.wrapping_add(runs);
        }
    }

    /// Records a started run, several times over where each feeds the next.
    pub(crate) fn record(&mut self, run: LastRun, encoder: &mut wgpu::CommandEncoder, runs: u32) -> Result<()> {
        let grids = self.grids(run, &|step| step.when.holds(false, false))?;
        self.prepared(run).record(encoder, &grids, runs);
        self.count(run, runs);
        self.last = Some(run);
        Ok(())
    }

    pub(crate) fn submit(&mut self, encoder: wgpu::CommandEncoder) -> Result<()> {
        let gpu = self.model.gpu();
        let submitted = gpu.finish(encoder).and_then(|commands| gpu.submit(commands));
        if let Some(watching) = &mut self.watching {
            watching.submitted(gpu, submitted.is_ok());
        }
        if submitted.is_err() {
            // What was refused did not run, so the device did not count it. If this is refused, too, the ring tells.
            let _ = gpu.scoped(|| self.write(Role::Finished, 0, &[self.finished]));
        }
        submitted.map(|_| ())
    }

    /// Writes words into the buffer of a role, if a program in use reads it.
    pub(crate) fn write(&self, role: Role, word: usize, words: &[u32]) {
        if let Some(buffer) = self.buffers.role(role).filter(|_| !words.is_empty()) {
            self.model.gpu().queue.write_buffer(&buffer.raw, word as u64 * 4, bytemuck::cast_slice(words));
        }
    }
}
