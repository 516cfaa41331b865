//! `moewe chat`.

use std::io::{BufRead, IsTerminal};

use anyhow::Context;
use moewe::text::{ChatOptions, Message, Text};
use moewe::watch;
use moewe_runtime::{GenerateOptions, SequenceId, Session, continue_sequence};

use super::args::ChatArgs;
use super::generate::{Outcome, Printer, options};
use super::served::Generator;
use super::{interrupt, model, output, usage};

/// A conversation: its messages and, if the model is changed, the sequence that holds them as far as it has read them.
struct Conversation<'a> {
    text: &'a Text,
    messages: Vec<Message>,
    sequence: Option<SequenceId>,
}

/// Talks until the input ends.
pub fn run(args: &ChatArgs) -> anyhow::Result<()> {
    let Some(opened) = model::open(&args.model)? else { return Ok(()) };
    let Some(text) = opened.text.as_ref().filter(|text| text.has_chat_template()) else {
        return usage(format!(
            "{}: the model has no tokenizer with a chat template; continue plain text with `moewe run`",
            args.model.path().display()
        ));
    };
    let options = options(&args.sampling, &args.model, &opened)?;
    let how = (&args.engine, &args.watch, &args.edits);
    let (_, mut generator) = Generator::new(&opened, &args.model, how, 1, &[])?;
    let system = || args.system.iter().map(Message::system).collect();
    let mut conversation = Conversation { text, messages: system(), sequence: None };
    let is_terminal = std::io::stdin().is_terminal();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if is_terminal {
            output::write("› ")?;
        }
        let line = interrupt::while_waiting(|| lines.next()).transpose().context("standard input")?;
        let Some(line) = line else { break };
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => break,
            "/clear" => {
                if let Generator::Watched(runner) = &mut generator {
                    conversation.forget(&mut runner.session)?;
                }
                conversation.messages = system();
                continue;
            }
            message => conversation.messages.push(Message::user(message)),
        }
        let answered = conversation.answer(&mut generator, &options, is_terminal);
        if !interrupt::is_set() {
            answered?;
        } else if is_terminal {
            interrupt::clear(); // it stopped the answer, not the conversation
        } else {
            break;
        }
    }
    generator.finish()
}

impl Conversation<'_> {
    /// Answers the last message. The model reads only what it has not read in earlier turns, unless the conversation is
    /// recorded: then each turn is a text of its own, with all that is before it.
    fn answer(
        &mut self,
        generator: &mut Generator,
        options: &GenerateOptions,
        is_terminal: bool,
    ) -> anyhow::Result<()> {
        let ids = self.text.encode_chat(&self.messages, &ChatOptions::default())?;
        let mut printer = Printer::new(Some(self.text), false);
        let prompt_tokens = ids.len();
        let push = |token| printer.push(token);
        let outcome = match generator {
            Generator::Served(served) => served.follow(served.submit(ids, options, 0)?, push)?,
            Generator::Watched(runner) => {
                let generated = if runner.is_recording() {
                    let asked = self.messages.last().and_then(|message| message.content.as_deref());
                    runner.generate(asked.map(watch::title).unwrap_or_default(), &ids, options, push)?
                } else {
                    let sequence = self.read(&mut runner.session, &ids, options)?;
                    continue_sequence(&mut runner.session, sequence, options, push)?
                };
                Outcome::of_session(prompt_tokens, generated)
            }
        };
        let answer = printer.finish()?;
        output::write("\n")?;
        if is_terminal {
            output::note(&outcome.summary());
        }
        self.messages.push(Message::assistant(answer));
        Ok(())
    }

    /// A sequence that holds `ids`: the one of the turn before if it begins the same, cut where it differs.
    fn read(&mut self, session: &mut Session, ids: &[u32], options: &GenerateOptions) -> anyhow::Result<SequenceId> {
        if let Some(sequence) = self.sequence {
            let held = session.tokens(sequence)?;
            // At least one token must be run for the model to say what follows.
            let common = held.iter().zip(ids).take_while(|(a, b)| a == b).count().min(ids.len() - 1);
            if common > 0 {
                session.rewind(sequence, common)?;
                session.append(sequence, &ids[common..])?;
                return Ok(sequence);
            }
            self.forget(session)?;
        }
        let sequence = session.add_sequence(ids, options.sampling)?;
        self.sequence = Some(sequence);
        Ok(sequence)
    }

    fn forget(&mut self, session: &mut Session) -> anyhow::Result<()> {
        if let Some(sequence) = self.sequence.take() {
            session.remove_sequence(sequence)?;
        }
        Ok(())
    }
}
