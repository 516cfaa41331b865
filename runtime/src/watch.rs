//! Watching: which taps are read while sequences run, and with which parameters they run.

use std::sync::Arc;

use moewe_plan::{FrameToken, Program, ProgramKind, Role, Step, TapChoice, TapFrame, TapGroup, TapSpec, TokenInfo};

use crate::frame::{Layout, Timed, Wanted};
use crate::record::Grids;
use crate::ring::{Frame, FrameReceiver, Ring};
use crate::session::LastRun;
use crate::taps::tells;
use crate::timing::Queries;
use crate::{Error, Model, Result, Session, SessionOptions};

/// The draft that runs behind watched runs.
pub(crate) const DRAFT: ProgramKind = ProgramKind::Draft { module: 1 };

/// Of so many decoding runs in succession the first is timed, if times are wanted. Each step of a timed run is a pass of
/// its own, which takes far longer than the run by itself where steps are short.
pub const DECODES_PER_TIMED_RUN: u32 = 16;

/// What a session reads while it runs.
///
/// Times ([`TapChoice::timing`]) are samples: a run that decodes (every token has its logits wanted) is timed if it is the
/// first one behind a prompt or behind [`Session::set_watch`], and then once in [`DECODES_PER_TIMED_RUN`]; a run of a prompt
/// is always timed, and a draft if the run before it was. Frames of other runs have no times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Which taps, and whether steps are timed. It can be changed between runs: [`Session::set_watch`].
    pub taps: TapChoice,
    /// Bytes of host memory for frames that nobody has taken yet. A frame that finds no room is dropped, so a frame
    /// larger than this always is.
    pub ring_bytes: u64,
}

impl Default for Watch {
    /// Nothing is read yet; 64 MiB.
    fn default() -> Self {
        Self { taps: TapChoice::none(), ring_bytes: 64 << 20 }
    }
}

/// The state of watching.
#[derive(Debug)]
pub(crate) struct Watching {
    taps: TapChoice,
    ring: Ring,
    /// For each program, whether each of its taps is read: in runs where not every token is a wanted row, and in the others.
    wanted: Vec<[Vec<bool>; 2]>,
    /// Made when steps are timed first.
    queries: Option<Queries>,
    /// Decoding runs since the last one that was timed, that one included; 0 if the next is to be timed.
    decodes: u32,
    /// Whether the last run of the main model was to be timed.
    timed: bool,
    /// Number of the next frame.
    number: u64,
    /// Frames that were recorded, but not submitted yet.
    recorded: Vec<Frame>,
}

impl Watching {
    pub(crate) fn new(model: &Model, options: &SessionOptions, watch: &Watch) -> Self {
        let (taps, ring) = (TapChoice::none(), Ring::new(watch.ring_bytes));
        let (wanted, recorded) = (Vec::new(), Vec::new());
        let mut watching = Self { taps, ring, wanted, queries: None, decodes: 0, timed: false, number: 0, recorded };
        watching.choose(model, options, watch.taps.clone());
        watching
    }

    fn choose(&mut self, model: &Model, options: &SessionOptions, taps: TapChoice) {
        // The rest of a draft's taps is for traces.
        let watched = |kind: ProgramKind, tap: &TapSpec| match kind {
            ProgramKind::Watch => true,
            kind => kind == DRAFT && tap.group == TapGroup::Mtp,
        };
        let wants = |kind: ProgramKind, tap: &TapSpec| {
            options.kinds.contains(&kind) && watched(kind, tap) && taps.wants_tap(tap)
        };
        let programs = model.plan().programs.iter();
        let of = |program: &Program, all_rows: bool| {
            let taps = program.taps.iter();
            taps.map(|tap| wants(program.kind, tap) && tells(program, tap, all_rows)).collect()
        };
        self.wanted = programs.map(|program| [of(program, false), of(program, true)]).collect();
        self.taps = taps;
        self.decodes = 0;
    }

    /// Whether taps or times of any program are read.
    fn reads(&self) -> bool {
        self.taps.timing || self.wanted.as_flattened().iter().flatten().any(|wanted| *wanted)
    }

    /// Whether a run that is recorded now is to be timed.
    fn times(&mut self, kind: ProgramKind, decodes: bool) -> bool {
        if kind != DRAFT {
            self.timed = !decodes || self.decodes == 0;
            self.decodes = if decodes { (self.decodes + 1) % DECODES_PER_TIMED_RUN } else { 0 };
        }
        self.timed
    }

    /// What was recorded was submitted, or was refused.
    pub(crate) fn submitted(&mut self, gpu: &crate::Gpu, well: bool) {
        for frame in self.recorded.drain(..) {
            if well { self.ring.submitted(gpu, frame) } else { self.ring.refused(frame) }
        }
    }
}

/// A run that can be recorded, with what is read of it.
#[derive(Debug)]
pub(crate) struct WatchedRun {
    run: LastRun,
    grids: Grids,
    /// Whether no step is left out.
    whole: bool,
    /// Without it, nothing is read.
    layout: Option<Arc<Layout>>,
    /// The same with times, if times are wanted.
    timed: Option<Arc<Layout>>,
    /// The rows, without their ids.
    tokens: Vec<Option<FrameToken>>,
}

impl Session {
    /// Changes what is read from the next run on. While nothing is read and all parameters are neutral, sequences run
    /// with the forward program, if the session has it: at full speed, and without frames. Drafts are only read of
    /// sequences that were watched with them from their first token on.
    ///
    /// # Errors
    /// [`Error::NotPrepared`] if the session was made without [`SessionOptions::watch`].
    pub fn set_watch(&mut self, taps: TapChoice) -> Result<()> {
        let watching = self.watching.as_mut();
        let watching = watching.ok_or(Error::NotPrepared { kind: ProgramKind::Watch, place: "session" })?;
        watching.choose(&self.model, &self.options, taps);
        Ok(())
    }

    /// Sets all parameters, in the order of the plan ([`moewe_plan::parameter_values`] makes such lists), from the next
    /// run on. What is cached of tokens stays as it was computed: add a sequence anew to see the whole text under the
    /// new values.
    ///
    /// # Errors
    /// [`Error::Parameters`] if a list has another length than its parameter, or holds a number that is not finite;
    /// [`Error::NotPrepared`] if a value is not neutral and the session has no watch programs.
    pub fn set_parameters(&mut self, values: &[Vec<f32>]) -> Result<()> {
        let wrong = |what: String| Err(Error::Parameters { what });
        let parameters = &self.model.plan().parameters;
        if values.len() != parameters.len() {
            return wrong(format!("{} lists of numbers, the plan has {} parameters", values.len(), parameters.len()));
        }
        let mut edited = false;
        for (parameter, values) in parameters.iter().zip(values) {
            let name = format!("{:?} of layer {}", parameter.kind, parameter.layer);
            if values.len() != parameter.len as usize {
                return wrong(format!("{} numbers for {name}, expected {}", values.len(), parameter.len));
            }
            if let Some(found) = values.iter().find(|value| !value.is_finite()) {
                return wrong(format!("{found} for {name}, expected finite numbers"));
            }
            let neutral: u32 = parameter.kind.neutral().to_bits();
            edited |= values.iter().any(|value| value.to_bits() != neutral);
        }
        if edited && !self.options.kinds.contains(&ProgramKind::Watch) {
            return Err(Error::NotPrepared { kind: ProgramKind::Watch, place: "session" });
        }
        self.write_parameters(values)?;
        self.edited = edited;
        Ok(())
    }

    /// The frames that are ready, in the order of their numbers. It does not wait; after [`Session::prefill`],
    /// [`Session::decode`] and [`Session::step`] all frames of their runs are ready.
    ///
    /// Each row of a frame is a token that was run, at a position of a sequence. A burst runs on behind the token that
    /// ends a text, and what it draws there is taken back ([`Session::rewind`], which [`crate::generate()`] calls at its end)
    /// while its frames have been handed out: readers leave out rows whose position is not below the sequence's final
    /// length. Where a position was run again, as after a rewind, the frame with the highest number counts.
    pub fn frames(&self) -> Vec<TapFrame> {
        let receiver = self.watching.as_ref().map(|watching| watching.ring.receiver());
        receiver.map_or_else(Vec::new, |receiver| std::iter::from_fn(|| receiver.try_recv()).collect())
    }

    /// Another way to the frames, for a thread of its own.
    ///
    /// # Errors
    /// [`Error::NotPrepared`] if the session was made without [`SessionOptions::watch`].
    pub fn frame_receiver(&self) -> Result<FrameReceiver> {
        let missing = Error::NotPrepared { kind: ProgramKind::Watch, place: "session" };
        self.watching.as_ref().map(|watching| watching.ring.receiver()).ok_or(missing)
    }

    /// Frames that were dropped so far, because frames before them had not been taken in time.
    pub fn dropped(&self) -> u64 {
        self.watching.as_ref().map_or(0, |watching| watching.ring.receiver().dropped())
    }

    /// The program with which sequences run now.
    pub(crate) fn forward_kind(&self) -> ProgramKind {
        let kinds = &self.options.kinds;
        let watch = self.edited
            || self.watching.as_ref().is_some_and(Watching::reads)
            || !kinds.contains(&ProgramKind::Forward);
        if watch && kinds.contains(&ProgramKind::Watch) { ProgramKind::Watch } else { ProgramKind::Forward }
    }

    /// Whether drafts are to run behind watched runs.
    pub(crate) fn reads_drafts(&self) -> bool {
        let Some(watching) = &self.watching else { return false };
        let mut drafts = self.model.programs(DRAFT, self.options.precision).into_iter();
        drafts.any(|(index, _)| watching.wanted[index].iter().flatten().any(|wanted| *wanted))
    }

    pub(crate) fn neutral_parameters(&self) -> Vec<Vec<f32>> {
        let parameters = self.model.plan().parameters.iter();
        parameters.map(|parameter| vec![parameter.kind.neutral(); parameter.len as usize]).collect()
    }

    /// Writes parameters that programs in use have.
    pub(crate) fn write_parameters(&self, values: &[Vec<f32>]) -> Result<()> {
        let gpu = self.model.gpu();
        for (parameter, values) in self.model.plan().parameters.iter().zip(values) {
            if let Some(buffer) = self.buffers.find(parameter.buffer) {
                let written = gpu.scoped(|| gpu.queue.write_buffer(&buffer.raw, 0, bytemuck::cast_slice(values)));
                written.map_err(|error| gpu.refused("parameters", &error))?;
            }
        }
        Ok(())
    }

    /// The rows of a batch, as frames tell of them.
    pub(crate) fn frame_tokens(&self, batch: &[TokenInfo]) -> Result<Vec<Option<FrameToken>>> {
        let token = |token: &TokenInfo| {
            let sequence = self.slots.by_slot(token.sequence)?.number();
            Ok(Some(FrameToken { sequence, position: token.position, id: 0 }))
        };
        batch.iter().map(token).collect()
    }

    /// A selected run with what is read of it now; `tokens` are its rows. Drafts cannot follow it.
    pub(crate) fn watched(
        &mut self,
        run: LastRun,
        tokens: Vec<Option<FrameToken>>,
        logprobs: bool,
    ) -> Result<WatchedRun> {
        let model = Arc::clone(&self.model);
        let program = &model.plan().programs[run.program];
        let taps: Vec<bool> = match &self.watching {
            Some(watching) => watching.wanted[run.program][usize::from(run.all_rows)].clone(),
            None => vec![false; program.taps.len()],
        };
        let serves = |step: &Step| step.only_for.is_empty() || step.only_for.iter().any(|&tap| taps[tap as usize]);
        let grids = self.grids(run, &|step| serves(step) && step.when.holds(false, logprobs))?;
        let whole = program.steps.iter().all(serves);
        let timed = self.timed(run, &grids)?;
        let mut wanted = Vec::new();
        for (tap, _) in program.taps.iter().zip(&taps).filter(|(_, wanted)| **wanted) {
            let (_, offset, bytes) = self.extent(tap, &run.symbols)?;
            wanted.push(Wanted { tap, dtype: model.plan().buffers[tap.buffer as usize].dtype, offset, bytes });
        }
        let layout = |timed| Arc::new(Layout::new(tokens.len(), &wanted, timed));
        let timed = timed.map(|timed| layout(Some(timed)));
        let layout = (!wanted.is_empty()).then(|| layout(None));
        if (layout.is_some() || timed.is_some()) && self.buffers.role(Role::Tokens).is_none() {
            return Err(Error::Plan { what: "its watch programs have no buffer of tokens".into() });
        }
        Ok(WatchedRun { run, grids, whole, layout, timed, tokens })
    }

    /// How the run is timed if it is, if times are wanted and the device has a clock.
    fn timed(&mut self, run: LastRun, grids: &Grids) -> Result<Option<Timed>> {
        let gpu = self.model.gpu();
        let Some(watching) = self.watching.as_mut().filter(|w| w.taps.timing && gpu.info().timestamps) else {
            return Ok(None);
        };
        if watching.queries.is_none() {
            let programs = self.model.plan().programs.iter();
            let watched = programs.filter(|program| program.kind == ProgramKind::Watch || program.kind == DRAFT);
            let most = watched.map(|program| program.steps.len()).max().unwrap_or(0);
            watching.queries = Some(Queries::new(gpu, most)?);
        }
        let ran = grids.iter().map(Option::is_some).collect();
        let (program, rows, period) = (run.program as u32, run.symbols.rows as u32, gpu.queue.get_timestamp_period());
        Ok(Some(Timed { program, rows, ran, period }))
    }

    /// Records a run and the copies of what is read of it. `ahead` is how far its tokens are ahead of its rows.
    pub(crate) fn record_watched(&mut self, watched: &WatchedRun, encoder: &mut wgpu::CommandEncoder, ahead: u32) {
        let WatchedRun { run, grids, whole, layout, timed, tokens } = watched;
        let kind = self.model.plan().programs[run.program].kind;
        let read = self.watching.as_mut().and_then(|watching| {
            let timed = timed.as_ref().filter(|_| watching.times(kind, run.all_rows));
            let layout = timed.or(layout.as_ref())?;
            let number = watching.number;
            watching.number += 1;
            let buffer = watching.ring.buffer(self.model.gpu(), layout.bytes)?;
            let token = |token: FrameToken| FrameToken { position: token.position + ahead, ..token };
            let tokens = tokens.iter().map(|row| row.map(token)).collect();
            Some(Frame { number, buffer, layout: Arc::clone(layout), tokens })
        });
        let prepared = self.prepared(*run);
        match read {
            None => prepared.record(encoder, grids, 1),
            Some(frame) => {
                let target = &frame.buffer.raw;
                // A run makes the sampled tokens the next batch, so its own are copied first.
                let batch = self.buffers.role(Role::Tokens).expect("`watched` saw to it");
                encoder.copy_buffer_to_buffer(&batch.raw, 0, target, 0, frame.layout.token_bytes());
                let queries = self.watching.as_ref().and_then(|watching| watching.queries.as_ref());
                match queries.zip(frame.layout.timed.as_ref()) {
                    None => prepared.record(encoder, grids, 1),
                    Some((queries, timed)) => {
                        prepared.record_timed(encoder, grids, queries);
                        queries.copy(encoder, timed.steps(), &frame.buffer, frame.layout.times_at);
                    }
                }
                for copy in &frame.layout.copies {
                    let source = &self.buffers.get(copy.buffer).raw;
                    encoder.copy_buffer_to_buffer(source, copy.offset, target, copy.at, copy.bytes);
                }
                if let Some(watching) = &mut self.watching {
                    watching.recorded.push(frame);
                }
            }
        }
        self.count(*run, 1);
        self.last = whole.then_some(*run);
    }
}
