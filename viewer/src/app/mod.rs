//! The whole window: panes with views, what is selected, where the tokens come from, and how it all stands.

mod bar;
mod drive;
mod help;
mod keys;
mod label;
mod notices;
mod panes;
mod save;
mod status;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::colour::Palette;
use crate::layout::Layout;
use crate::numbers::Table;
use crate::selection::Selection;
use crate::source::{Command, Event, Notice, Request, Source};
use crate::store::Store;
use crate::subject::Subject;
use crate::view::{Cx, View};

pub use save::{Exports, StoreExport, WriteStore, WriteTables};

/// Work on the store in a frame, at most.
const STORE_TIME: Duration = Duration::from_millis(4);

/// What an app begins with.
pub struct Options {
    /// The views, in the order of their tabs and of the keys 1 to 9.
    pub views: Vec<Box<dyn View>>,
    /// Bytes of rows that are held at most.
    pub budget: usize,
    /// What is selected at first.
    pub selection: Selection,
    /// Colours of maps.
    pub palette: Palette,
    /// What the prompt box of a live source begins with.
    pub request: Request,
    /// Tokens a second of a recording that plays.
    pub speed: f64,
    /// Time between two frames that are drawn only because there is news. A software driver needs the processor for a
    /// frame that the model wants, too.
    pub pace: Duration,
    /// How numbers become files.
    pub exports: Exports,
    /// Where files are written, if the user does not say otherwise.
    pub folder: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            views: crate::views::all(),
            budget: 1 << 30,
            selection: Selection::default(),
            palette: Palette::default(),
            request: Request { max_new_tokens: 64, ..Request::default() },
            speed: 20.0,
            pace: Duration::from_millis(16),
            exports: Exports::default(),
            folder: PathBuf::from("."),
        }
    }
}

/// What is kept between runs.
#[derive(Serialize, Deserialize)]
struct Kept {
    layout: String,
    palette: Palette,
}

/// The viewer.
pub struct App {
    source: Box<dyn Source>,
    subject: Arc<Subject>,
    store: Store,
    selection: Selection,
    palette: Palette,
    views: Vec<Box<dyn View>>,
    layout: Layout,
    /// Events that came but are not in the store yet.
    pending: VecDeque<Event>,
    commands: Vec<Command>,
    /// The token that is to be selected as soon as the text is long enough again.
    later: Option<u32>,
    /// The source tells everything anew: the selected text may still come.
    is_returning: bool,
    /// Names of the views that the last frame drew.
    drawn: Vec<&'static str>,
    pace: Duration,
    is_woken: bool,
    bar: bar::Bar,
    drive: drive::Drive,
    focus: keys::Focus,
    help: help::Help,
    notices: notices::Notices,
    save: save::Saving,
    speedometer: status::Speedometer,
}

impl App {
    /// An app over a source.
    pub fn new(source: Box<dyn Source>, subject: Subject, options: Options) -> Self {
        let names: Vec<&str> = options.views.iter().map(|view| view.name()).collect();
        Self {
            store: Store::new(subject.model.experts, options.budget),
            source,
            subject: Arc::new(subject),
            selection: options.selection,
            palette: options.palette,
            layout: Layout::standard(&names),
            views: options.views,
            pending: VecDeque::new(),
            commands: Vec::new(),
            later: None,
            is_returning: false,
            drawn: Vec::new(),
            pace: options.pace,
            is_woken: false,
            bar: bar::Bar::default(),
            drive: drive::Drive::new(options.request, options.speed),
            focus: keys::Focus::default(),
            help: help::Help::default(),
            notices: notices::Notices::default(),
            save: save::Saving::new(options.exports, options.folder),
            speedometer: status::Speedometer::default(),
        }
    }

    /// What is to be kept for the next run, as text.
    pub fn kept(&self) -> String {
        let kept = Kept { layout: self.layout.to_json(), palette: self.palette };
        serde_json::to_string(&kept).unwrap_or_default()
    }

    /// Takes up what [`App::kept`] gave in an earlier run. What is damaged, or is about other views, is passed over.
    pub fn restore(&mut self, kept: &str) {
        let Ok(kept) = serde_json::from_str::<Kept>(kept) else { return };
        self.palette = kept.palette;
        if let Some(layout) = Layout::from_json(&kept.layout, &self.names()) {
            self.layout = layout;
        }
    }

    /// Names of all views.
    pub fn names(&self) -> Vec<&'static str> {
        self.views.iter().map(|view| view.name()).collect()
    }

    /// What is watched.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// What has been seen.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What is selected.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Selects something else.
    pub fn selection_mut(&mut self) -> &mut Selection {
        &mut self.selection
    }

    /// Brings a view to the front. Names that there are not are passed over.
    pub fn focus(&mut self, view: &str) {
        self.layout.focus(view);
    }

    /// Hides a view, or shows it where it was.
    pub fn set_shown(&mut self, view: &str, shown: bool) {
        self.layout.set_shown(view, shown);
    }

    /// Shows a part of a view; whether there is such a view with such a part.
    pub fn show_part(&mut self, view: &str, part: &str) -> bool {
        let view = self.views.iter_mut().find(|of| of.name() == view);
        let place = view.as_ref().and_then(|view| view.parts().iter().position(|name| *name == part));
        let (Some(view), Some(place)) = (view, place) else { return false };
        view.show_part(place);
        true
    }

    /// Names of a view's parts.
    pub fn parts(&self, view: &str) -> &'static [&'static str] {
        self.views.iter().find(|of| of.name() == view).map_or(&[], |view| view.parts())
    }

    /// Whether a view has not been hidden.
    pub fn is_shown(&self, view: &str) -> bool {
        self.layout.is_shown(view)
    }

    /// Tells the user something.
    pub fn notify(&mut self, notice: Notice) {
        self.notices.push(notice);
    }

    /// Everything that is told to the user now.
    pub fn notices(&self) -> impl Iterator<Item = &Notice> {
        self.notices.iter()
    }

    /// Lets a recording run to its end, as far as it is read.
    pub fn show_all(&mut self) {
        if let Some(replay) = self.source.replay()
            && replay.position() < replay.len()
        {
            let end = replay.len();
            replay.seek(end);
        }
    }

    /// Takes in what the source has, for about as long as `limit`. Whether there is nothing left now.
    pub fn poll(&mut self, limit: Duration) -> bool {
        let started = Instant::now();
        let is_live = self.source.status().is_live;
        let follows = is_live || self.source.replay().is_some_and(|replay| replay.speed() > 0.0);
        loop {
            let Some(event) = self.pending.pop_front() else {
                self.pending.extend(self.source.poll());
                if self.pending.is_empty() {
                    return true;
                }
                continue;
            };
            self.take(event, is_live, follows);
            if started.elapsed() >= limit {
                return false;
            }
        }
    }

    fn take(&mut self, event: Event, is_live: bool, follows: bool) {
        match &event {
            Event::Begin(info) if follows => {
                let selection = &mut self.selection;
                if self.store.sequence(selection.sequence).is_some() {
                    (selection.token, self.later) = (None, None);
                }
                selection.sequence = info.number;
                selection.other = info.parent.map(|(parent, _)| parent).or(selection.other);
            }
            Event::Reset => self.is_returning = true,
            _ => {}
        }
        self.speedometer.count(&event);
        let is_end = matches!(event, Event::End { .. });
        if let Some(notice) = self.store.apply(event)
            && (!is_end || is_live)
        {
            self.notices.push(notice); // recordings have an end for every text: that is no news
        }
    }

    /// What is still missing from the picture, if anything: the source is at work, or a view that is drawn computes.
    pub fn waits_for(&self) -> Option<String> {
        let status = self.source.status();
        if !self.pending.is_empty() || status.busy {
            let doing = if status.doing.is_empty() { "the source has more to give" } else { &status.doing };
            return Some(doing.to_owned());
        }
        let mut drawn = self.views.iter().filter(|view| self.drawn.contains(&view.name()));
        drawn.find(|view| view.is_busy()).map(|view| format!("the view {} computes", view.name()))
    }

    /// Draws everything.
    pub fn ui(&mut self, ui: &mut egui::Ui) {
        self.begin(ui.ctx());
        let status = self.source.status();
        egui::Panel::top("bar").show(ui, |ui| bar::ui(self, ui));
        egui::Panel::bottom("status").show(ui, |ui| status::ui(self, ui, &status));
        let (is_live, is_recording) = (status.is_live, self.source.replay().is_some());
        if is_live || is_recording {
            egui::Panel::bottom("drive").show(ui, |ui| drive::ui(self, ui, &status));
        }
        let panes = egui::CentralPanel::default()
            .frame(egui::Frame::NONE.fill(ui.visuals().panel_fill))
            .show(ui, |ui| panes::ui(self, ui, is_live));
        help::ui(self, ui.ctx());
        save::ui(self, ui.ctx());
        notices::ui(&mut self.notices, ui.ctx(), panes.response.rect);
        keys::act(self, ui.ctx());
        self.end();
    }

    /// Draws one view without the rest, for pictures: below a line that says what it is about.
    pub fn view_ui(&mut self, ui: &mut egui::Ui, view: &str) {
        self.begin(ui.ctx());
        let is_live = self.source.status().is_live;
        let caption = self.caption();
        egui::CentralPanel::default().show(ui, |ui| {
            let Some((view, mut cx)) = self.stage(view, is_live) else { return };
            ui.horizontal_wrapped(|ui| {
                ui.strong(panes::title(view.name()));
                ui.weak(caption);
            });
            ui.separator();
            view.ui(ui, &mut cx);
            self.drawn = vec![view.name()];
        });
        self.end();
    }

    /// The numbers of a view; `None` if there is no view of that name. May take long.
    pub fn numbers(&mut self, view: &str) -> Option<Vec<Table>> {
        let is_live = self.source.status().is_live;
        self.stage(view, is_live).map(|(view, cx)| view.numbers(&cx))
    }

    /// A view and what it sees.
    fn stage(&mut self, view: &str, is_live: bool) -> Option<(&mut Box<dyn View>, Cx<'_>)> {
        let view = self.views.iter_mut().find(|one| one.name() == view)?;
        let cx = Cx {
            subject: &self.subject,
            store: &self.store,
            selection: &mut self.selection,
            commands: &mut self.commands,
            is_live,
            palette: self.palette,
        };
        Some((view, cx))
    }

    fn begin(&mut self, ctx: &egui::Context) {
        if !self.is_woken {
            let ctx = ctx.clone();
            let pace = self.pace;
            self.source.set_wake(Box::new(move || ctx.request_repaint_after(pace)));
            self.is_woken = true;
        }
        if !self.poll(STORE_TIME) {
            ctx.request_repaint();
        }
        self.clamp();
        self.drawn.clear();
    }

    /// Keeps the selection within what there is. A token that is not there yet, or not there any more because a recording
    /// went back, is selected when it comes.
    fn clamp(&mut self) {
        let (model, selection) = (&self.subject.model, &mut self.selection);
        selection.layer = selection.layer.min(model.layers.saturating_sub(1));
        selection.head = selection.head.min(model.num_attention_heads.saturating_sub(1));
        selection.expert = selection.expert.filter(|expert| *expert < model.experts);
        let is_quiet = self.pending.is_empty() && !self.source.status().busy;
        let texts = self.store.sequences();
        if self.store.sequence(selection.sequence).is_none() && (!self.is_returning || is_quiet) {
            let text = if self.is_returning { texts.last() } else { texts.first() };
            selection.sequence = text.map_or(selection.sequence, |text| text.info.number);
        }
        self.is_returning &= !is_quiet;
        let tokens = self.store.sequence(selection.sequence).map_or(0, |sequence| sequence.tokens.len());
        let is_there = |token: &u32| (*token as usize) < tokens;
        self.later = match selection.token {
            Some(token) if !is_there(&token) => Some(token),
            Some(_) => None,
            None => self.later,
        };
        selection.token = selection.token.filter(is_there).or(self.later.filter(is_there));
    }

    fn end(&mut self) {
        for command in self.commands.drain(..) {
            self.source.send(command);
        }
    }

    /// What a picture is about: the model, the text, and what is selected.
    fn caption(&self) -> String {
        let selection = &self.selection;
        let mut parts = vec![format!("{} on {}", self.subject.name, self.subject.device)];
        if let Some(sequence) = self.store.sequence(selection.sequence) {
            parts.push(bar::text_name(sequence));
            if let Some(token) = selection.token.and_then(|at| Some((at, sequence.tokens.get(at as usize)?))) {
                parts.push(format!("token {} “{}”", token.0, self.subject.piece(token.1.id)));
            }
        }
        parts.push(format!("layer {}", selection.layer));
        parts.extend(selection.expert.map(|expert| format!("expert {expert}")));
        parts.push(format!("head {}", selection.head));
        parts.join(" · ")
    }
}
