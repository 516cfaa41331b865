//! How `run` and `chat` generate where something is recorded or changed: watched.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use moewe::subject::subject;
use moewe::watch::{self, Watch};
use moewe_plan::{Edit, ProgramKind, TapChoice, parameter_values};
use moewe_runtime::{GenerateOptions, Generated, Model, Session, generate};
use moewe_viewer::recording::Recorder;
use moewe_viewer::store::SequenceInfo;

use super::args::{EditArgs, ModelArgs, WatchArgs};
use super::model::{self, Opened};
use super::usage;

/// A watched session, and the recording that it is written to.
pub struct Runner {
    /// The session.
    pub session: Session,
    recording: Option<Recording>,
}

struct Recording {
    watch: Watch,
    recorder: Recorder,
    edits: Vec<Edit>,
}

impl Runner {
    /// Loads the model for what is asked, and for `others` besides.
    pub fn new(
        opened: &Opened,
        args: &ModelArgs,
        watching: &WatchArgs,
        edits: &EditArgs,
        others: &[ProgramKind],
    ) -> anyhow::Result<(Arc<Model>, Self)> {
        let edits = edits.edits();
        let taps = if watching.record.is_some() { watching.taps.clone() } else { TapChoice::none() };
        let kinds = watched_kinds(opened, &taps)?;
        let values = parameter_values(opened.plan(), &edits)?;
        let model = opened.load_first(&kinds, others)?;
        let timed = taps.timing;
        let mut session = model::session(&model, args, &kinds, Some(taps))?;
        session.set_parameters(&values)?;
        let recording = match &watching.record {
            None => None,
            Some(path) => {
                let subject = subject(
                    &name(args.path()),
                    opened.bundle(),
                    opened.text.as_ref(),
                    model.gpu(),
                    args.precision.into(),
                    timed,
                )?;
                let recorder =
                    if path.exists() { Recorder::append(path, &subject)? } else { Recorder::create(path, &subject)? };
                Some(Recording { watch: Watch::new(session.frame_receiver()?), recorder, edits })
            }
        };
        Ok((model, Self { session, recording }))
    }

    /// Whether what is generated is recorded.
    pub fn is_recording(&self) -> bool {
        self.recording.is_some()
    }

    /// Generates from a prompt in a sequence of its own.
    pub fn generate(
        &mut self,
        name: String,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> anyhow::Result<Generated> {
        let Some(Recording { watch, recorder, edits }) = &mut self.recording else {
            return Ok(generate(&mut self.session, prompt, options, on_token)?);
        };
        let info = SequenceInfo { name, edits: edits.clone(), ..SequenceInfo::default() };
        let mut sink = |event| recorder.push(&event);
        Ok(watch.generate(&mut self.session, prompt, info, options, &mut sink, &mut on_token)?)
    }

    /// Completes the recording.
    pub fn finish(self) -> anyhow::Result<()> {
        match self.recording {
            Some(recording) => {
                recording.recorder.finish()?;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// The programs for watching; a usage error if the bundle was made without them.
pub fn watched_kinds(opened: &Opened, taps: &TapChoice) -> anyhow::Result<Vec<ProgramKind>> {
    let plan = opened.plan();
    if !plan.programs.iter().any(|program| program.kind == ProgramKind::Watch) {
        return usage(
            "the bundle was compiled with --taps none; to watch or change the model, compile it with --taps all",
        );
    }
    let watched = plan.programs.iter().filter(|program| program.kind == ProgramKind::Watch);
    let offered: Vec<_> = watched.flat_map(|program| &program.taps).map(|tap| (tap.group, tap.layer)).collect();
    // A whole group may be empty: not every model has experts or modules of multi-token prediction.
    let missing = taps.groups.iter().find(|(group, layer)| layer.is_some() && !offered.contains(&(*group, *layer)));
    if let Some(&(group, Some(layer))) = missing {
        return usage(format!(
            "--taps {}:{layer}: the bundle has no such tap; the model has {} layers, and the bundle may have been compiled with \
             fewer --taps",
            group.name(),
            plan.model.layers
        ));
    }
    Ok(watch::kinds(taps, plan.model.mtp_modules))
}

/// What people call a model: the last part of its path.
pub fn name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.into());
    full.file_name().map_or_else(|| full.display().to_string(), |name| name.to_string_lossy().into_owned())
}
