//! A running model as a source for the viewer: a thread that owns the session, and two channels.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use moewe_plan::{Sampling, parameter_values};
use moewe_runtime::{GenerateOptions, Session};
use moewe_viewer::source::{Command, Event, Prompt, Request, Source, Status};
use moewe_viewer::store::SequenceInfo;

use crate::text::Text;
use crate::watch::{Error, Watch, title};

/// Events that one poll hands out at most, so that a window stays smooth.
const EVENTS_PER_POLL: usize = 512;

type Wake = Arc<Mutex<Option<Box<dyn Fn() + Send + Sync>>>>;

/// A running model.
pub struct Live {
    commands: Sender<Request>,
    events: Receiver<Event>,
    shared: Arc<Shared>,
    wake: Wake,
}

#[derive(Debug, Default)]
struct Shared {
    /// Requests that are waiting or being served.
    open: AtomicUsize,
    stop: AtomicBool,
    doing: Mutex<String>,
}

/// What the thread has.
struct Worker {
    session: Session,
    text: Option<Text>,
    watch: Watch,
    /// What requests do not say: tokens that end a text, chunk and burst.
    defaults: GenerateOptions,
    events: Sender<Event>,
    shared: Arc<Shared>,
    wake: Wake,
}

impl Live {
    /// Starts serving requests with a session that was made to be watched.
    pub fn new(session: Session, watch: Watch, text: Option<Text>, defaults: GenerateOptions) -> Self {
        let (commands, requests) = channel::<Request>();
        let (sender, events) = channel();
        let (shared, wake) = (Arc::new(Shared::default()), Wake::default());
        let mut worker =
            Worker { session, text, watch, defaults, events: sender, shared: shared.clone(), wake: wake.clone() };
        std::thread::spawn(move || {
            for request in requests {
                worker.serve(request);
                worker.shared.open.fetch_sub(1, Ordering::SeqCst);
                call(&worker.wake);
            }
        });
        Self { commands, events, shared, wake }
    }
}

impl Source for Live {
    fn poll(&mut self) -> Vec<Event> {
        self.events.try_iter().take(EVENTS_PER_POLL).collect()
    }

    fn send(&mut self, command: Command) {
        match command {
            Command::Generate(request) => {
                self.shared.open.fetch_add(1, Ordering::SeqCst);
                // The thread ends with this end of the channel.
                let _ = self.commands.send(request);
            }
            Command::Stop => self.shared.stop.store(true, Ordering::SeqCst),
        }
    }

    fn status(&self) -> Status {
        let busy = self.shared.open.load(Ordering::SeqCst) > 0;
        let doing = self.shared.doing.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Status { is_live: true, busy, doing: if busy { doing } else { String::new() }, progress: None }
    }

    fn set_wake(&mut self, wake: Box<dyn Fn() + Send + Sync>) {
        *self.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

/// Nobody listens to the events any more.
#[derive(Debug, thiserror::Error)]
#[error("the window was closed")]
struct Closed;

/// Tells the window that there is news, if it asked for that.
fn call(wake: &Wake) {
    if let Some(wake) = &*wake.lock().unwrap_or_else(PoisonError::into_inner) {
        wake();
    }
}

impl Worker {
    fn serve(&mut self, request: Request) {
        self.shared.stop.store(false, Ordering::SeqCst);
        if let Err(what) = self.generate(request) {
            let _ = self.events.send(Event::Error(what)); // nobody listens: then there is nobody to tell
        }
    }

    fn generate(&mut self, request: Request) -> Result<(), String> {
        let prompt = match &request.prompt {
            Prompt::Tokens(tokens) => tokens.clone(),
            Prompt::Text(text) => match &self.text {
                _ if text.is_empty() => return Err("the prompt is empty: write something to begin with".into()),
                Some(tokenizer) => tokenizer.encode(text, true).map_err(|error| error.to_string())?,
                None => return Err("the model has no tokenizer.json, so text cannot be read".into()),
            },
        };
        let values = parameter_values(self.session.model().plan(), &request.edits).map_err(|e| e.to_string())?;
        self.session.set_parameters(&values).map_err(|error| error.to_string())?;
        let name = request.name.unwrap_or_else(|| name_of(&request.prompt, request.parent));
        *self.shared.doing.lock().unwrap_or_else(PoisonError::into_inner) = format!("writing {name}");
        let options = GenerateOptions {
            max_new_tokens: request.max_new_tokens,
            sampling: Sampling {
                temperature: request.temperature,
                seed_low: request.seed as u32,
                seed_high: (request.seed >> 32) as u32,
                ..self.defaults.sampling
            },
            ..self.defaults.clone()
        };
        let info = SequenceInfo { name, edits: request.edits, parent: request.parent, ..SequenceInfo::default() };
        let (events, shared) = (self.events.clone(), Arc::clone(&self.shared));
        let wake = Arc::clone(&self.wake);
        let mut sink = |event| {
            let sent = events.send(event).map_err(|_| Closed);
            call(&wake);
            sent
        };
        let mut on_token = |_| {
            if shared.stop.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        match self.watch.generate(&mut self.session, &prompt, info, &options, &mut sink, &mut on_token) {
            Ok(_) | Err(Error::Sink(Closed)) => Ok(()),
            Err(Error::Session(error)) => Err(error.to_string()),
        }
    }
}

/// A name for a text that was given none.
fn name_of(prompt: &Prompt, parent: Option<(u32, u32)>) -> String {
    if let Some((number, position)) = parent {
        return format!("text {number} from {position} on");
    }
    match prompt {
        Prompt::Tokens(tokens) => format!("{} tokens", tokens.len()),
        Prompt::Text(text) => title(text),
    }
}
