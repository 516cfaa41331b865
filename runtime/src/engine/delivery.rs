//! What a pass brought: tokens, log probabilities, experts, frames; and how requests end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moewe_plan::TapFrame;

use super::core::{Core, Live};
use super::disk::Disk;
use super::request::{Event, Finished, Logprobs, Tokens};
use super::scheduler::{Item, Reason};
use super::watchers::{Watched, part};
use super::{Stats, guarded, lock};
use crate::{Error, Stepped, StopReason};

/// What a step brought a request.
struct Brought<'a> {
    item: &'a Item,
    /// Whether it ran a part of a prompt.
    prefills: bool,
    /// Tokens that the passes drew, those behind the end of the text included.
    drawn: usize,
    ids: Vec<u32>,
    logprobs: Vec<Logprobs>,
    /// Whether the request ends with these.
    end: Option<End>,
}

enum End {
    Well(StopReason),
    Failed(Error),
}

impl Core {
    /// Takes in what a step brought, and tells everybody concerned.
    pub(super) fn brought(&mut self, items: &[Item], stepped: Vec<Stepped>, now: Instant) {
        let all: Vec<Brought<'_>> =
            items.iter().zip(stepped).filter_map(|(item, stepped)| self.drawn(item, stepped, now)).collect();
        for one in all.iter().filter(|one| !one.ids.is_empty()) {
            let Some(live) = self.live.get(&one.item.id) else { continue };
            let (Some(begun), request) = (live.begun, live.number()) else { continue };
            self.watchers.tell(begun, || Watched::Tokens { request, ids: one.ids.clone() });
        }
        self.show(items);
        for one in all {
            self.deliver(one);
        }
    }

    /// What of the drawn tokens belongs to the text of a request.
    fn drawn<'a>(&mut self, item: &'a Item, stepped: Stepped, now: Instant) -> Option<Brought<'a>> {
        let live = self.live.get_mut(&item.id)?;
        let prefills = live.new_tokens() == 0 || item.tokens > 1;
        if prefills {
            self.stats.prefill_tokens += item.tokens as u64;
        }
        if stepped.verified.is_empty() && !prefills {
            (0..stepped.passes).for_each(|_| live.drafting.saw(0, 0));
        }
        for &(drafted, accepted) in &stepped.verified {
            live.drafting.saw(drafted as usize, accepted as usize);
            self.costs.saw_drafts(drafted as usize, accepted as usize);
            let positions = &mut self.stats.acceptance;
            positions.resize(positions.len().max(drafted as usize), (0, 0));
            for (position, (offered, taken)) in positions.iter_mut().enumerate().take(drafted as usize) {
                *offered += 1;
                *taken += u64::from(position < accepted as usize);
            }
        }
        let room = live.request.max_new_tokens - live.new_tokens();
        let ends = |token: &u32| {
            live.request.stop_tokens.contains(token) || (!live.request.ignore_eos && self.eos.contains(token))
        };
        let drawn = stepped.tokens.len();
        let stop = stepped.tokens.iter().take(room).position(ends);
        let count = stop.map_or(drawn.min(room), |at| at + 1);
        let mut ids = stepped.tokens;
        ids.truncate(count);
        let top = live.request.logprobs.unwrap_or(0) as usize;
        let logprobs = stepped.logprobs.into_iter().take(count).map(|mut logprobs| {
            logprobs.top.truncate(top);
            Logprobs { logprob: logprobs.logprob, top: logprobs.top }
        });
        let logprobs = logprobs.collect();
        live.tokens.extend(&ids);
        self.stats.new_tokens += count as u64;
        if count > 0 && live.first_token.is_none() {
            live.first_token = Some(now);
        }
        let steered = if count > 0 { live.steering.drawn(&ids) } else { Ok(false) };
        let max_context = self.session.model().plan().model.max_context as usize;
        let full = live.new_tokens() >= live.request.max_new_tokens || live.tokens.len() >= max_context;
        let end = match steered {
            Err(error) => Some(End::Failed(error)),
            Ok(complete) if complete || stop.is_some() => Some(End::Well(StopReason::Eos)),
            Ok(_) if full => Some(End::Well(self.full_reason(item.id))),
            Ok(_) => stepped.poisoned.then_some(End::Failed(Error::Poisoned)),
        };
        Some(Brought { item, prefills, drawn, ids, logprobs, end })
    }

    /// Shows what was read of a step's passes.
    fn show(&mut self, items: &[Item]) {
        let dropped = self.session.dropped();
        self.watchers.dropped(dropped - self.dropped);
        self.dropped = dropped;
        let frames = self.session.frames();
        if frames.is_empty() {
            return;
        }
        let number = |item: &Item| Some((self.live.get(&item.id)?.sequence?.number(), item.id));
        let owners: HashMap<u32, u64> = items.iter().filter_map(number).collect();
        for frame in frames {
            self.show_frame(frame, &owners);
        }
    }

    fn show_frame(&mut self, mut frame: TapFrame, owners: &HashMap<u32, u64>) {
        let mut begun = Vec::with_capacity(frame.tokens.len());
        let mut fresh = vec![false; frame.tokens.len()];
        for (row, fresh) in fresh.iter_mut().enumerate() {
            let position = frame.tokens[row].position as usize;
            let live = owners.get(&frame.tokens[row].sequence).and_then(|id| self.live.get_mut(id));
            // The device may have run on behind the end of a text. Its last token is not run unless it did.
            let Some(live) = live.filter(|live| position + 1 < live.tokens.len()) else { continue };
            if let Some(experts) = &mut live.experts {
                experts.see(&self.routing, &frame, row);
            }
            // What was run before the request was preempted was shown.
            if position >= live.seen {
                live.seen = position + 1;
                *fresh = true;
                begun.push(live.begun.unwrap_or(0));
                frame.tokens[row].sequence = live.number();
            }
        }
        if begun.is_empty() {
            return;
        }
        if fresh.contains(&false) {
            frame = part(&frame, &fresh, &vec![true; frame.tensors.len()], true);
        }
        self.watchers.frame(frame, &begun);
    }

    /// Hands out what a request was given, and ends it if it is done.
    fn deliver(&mut self, brought: Brought<'_>) {
        let Brought { item, prefills, drawn, ids, logprobs, end } = brought;
        let Some(live) = self.live.get_mut(&item.id) else { return };
        let count = ids.len();
        let mut heard = true;
        if count > 0 {
            let told = match &mut live.experts {
                Some(experts) => experts.take(self.routing.row(), live.request.prompt.len(), count),
                None => Some((Vec::new(), Vec::new())),
            };
            let Some((prompt_experts, experts)) = told else {
                let ring_bytes = self.session.options().watch.as_ref().map_or(0, |watch| watch.ring_bytes);
                return self.fail(item.id, &Arc::new(Error::FramesLost { ring_bytes }));
            };
            heard = live.tell(Event::Tokens(Tokens { ids, logprobs, experts, prompt_experts }));
        }
        match end {
            Some(End::Failed(error)) => return self.fail(item.id, &Arc::new(error)),
            _ if !heard => return self.end(item.id, StopReason::Stopped),
            Some(End::Well(reason)) => return self.end(item.id, reason),
            None => {}
        }
        self.scheduler.ran(item, drawn);
        // Others that begin alike need not wait for its end.
        if prefills && count > 0 {
            self.keep(item.id, false);
        }
    }

    /// Keeps the latents of a request for others.
    fn keep(&mut self, id: u64, ends: bool) {
        let Some(live) = self.live.get(&id) else { return };
        let Some(sequence) = live.sequence else { return };
        if let Err(error) = self.cache.keep(&mut self.session, sequence, &live.tokens, ends) {
            self.warn(error.to_string());
        }
    }

    /// Ends a request whose prompt and text are too long for all pages.
    pub(super) fn give_up(&mut self, id: u64, reason: Reason) {
        let Some(live) = self.live.get_mut(&id) else { return };
        live.preemptions = live.preemptions.saturating_sub(u32::from(live.admitted.is_some()));
        let Reason::OutOfPages { needed, total, .. } = reason;
        if live.new_tokens() > 0 {
            self.end(id, StopReason::Context);
        } else {
            self.fail(id, &Arc::new(Error::OutOfPages { needed, free: total, total }));
        }
    }

    /// Ends a request well.
    pub(super) fn end(&mut self, id: u64, stop_reason: StopReason) {
        // What was computed up to here is right, whatever the reason.
        if self.live.get(&id).is_some_and(|live| live.first_token.is_some()) {
            self.keep(id, true);
        }
        let Some(mut live) = self.forget(id) else { return };
        let now = Instant::now();
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        self.stats.cancelled += u64::from(stop_reason == StopReason::Stopped);
        let finished = Finished {
            stop_reason,
            prompt_tokens: live.request.prompt.len(),
            cached_tokens: live.cached_tokens,
            new_tokens: live.new_tokens(),
            acceptance: live.drafting.acceptance(),
            preemptions: live.preemptions,
            waited: between(Some(live.submitted), live.admitted.or(Some(now))),
            prefill: between(live.admitted, live.first_token),
            decode: between(live.first_token, Some(now)),
        };
        // Whoever hears of the end finds it in the figures.
        self.publish();
        self.show_end(&live, stop_reason.name(), finished.decode_rate());
        live.tell(Event::Finished(Box::new(finished)));
        retire(live);
    }

    /// Ends a request with an error.
    pub(super) fn fail(&mut self, id: u64, error: &Arc<Error>) {
        let Some(mut live) = self.forget(id) else { return };
        self.stats.failed += 1;
        self.publish();
        self.show_end(&live, &error.to_string(), 0.0);
        live.tell(Event::Failed(Arc::clone(error)));
        retire(live);
    }

    fn show_end(&self, live: &Live, reason: &str, tokens_per_second: f64) {
        let (Some(begun), request) = (live.begun, live.number()) else { return };
        self.watchers.tell(begun, || Watched::Ended { request, reason: reason.to_owned(), tokens_per_second });
    }

    /// Takes a request out, and frees what it had.
    fn forget(&mut self, id: u64) -> Option<Live> {
        let live = self.live.remove(&id)?;
        self.scheduler.remove(id);
        if let Some(sequence) = live.sequence {
            // It cannot be unknown: it was added when the request was admitted.
            let _ = self.session.remove_sequence(sequence);
        }
        self.stats.requests += 1;
        let mut held = lock(&self.shared.held);
        held.bytes = held.bytes.saturating_sub(live.bytes);
        held.requests = held.requests.saturating_sub(1);
        held.waiting = held.waiting.min(held.requests);
        drop(held);
        Some(live)
    }

    /// Something could not be run. The requests concerned fail; if the device is gone, all do.
    pub(super) fn fault(&mut self, error: Error, concerned: &[u64]) {
        let lost = matches!(error, Error::DeviceLost { .. } | Error::Interrupted);
        let error = Arc::new(error);
        let mut ids = concerned.to_vec();
        if lost {
            self.broken = Some(Arc::clone(&error));
            ids = self.live.keys().copied().collect();
        }
        for id in ids {
            self.fail(id, &error);
        }
        self.publish();
    }

    pub(super) fn warn(&mut self, text: String) {
        if !self.stats.warnings.contains(&text) && self.stats.warnings.len() < 16 {
            self.stats.warnings.push(text);
        }
    }

    /// Shows the figures of now.
    pub(super) fn publish(&mut self) {
        if let Some(warning) = self.cache.disk().and_then(Disk::take_warning) {
            self.warn(warning);
        }
        let counts = self.scheduler.counts();
        let (pages, free_pages) = self.session.pages();
        let disk = self.cache.disk();
        *lock(&self.shared.stats) = Stats {
            waiting: counts.waiting,
            running: counts.prefill + counts.decode,
            pages,
            free_pages,
            cached_pages: self.cache.pages(),
            preempted: counts.preempted,
            host_bytes: lock(&self.shared.held).bytes,
            disk: disk.map(Disk::stats),
            ..self.stats.clone()
        };
    }
}

/// Lets go of a request, with what others have written: dropping that may panic, too.
fn retire(live: Live) {
    let _ = guarded(move || drop(live));
}
