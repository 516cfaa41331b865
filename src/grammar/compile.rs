//! Compiling grammars of clients: with limits, and where nothing can break.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::TokEnv;
use llguidance::{Matcher, ParserFactory, panic_utils};

use super::{GrammarError, reason};

/// The compiler recurses into schemas and along chains of references. What the limits of [`super::schema`] allow takes
/// less than a quarter of this.
const STACK: usize = 256 << 20;
/// Most grammars that are compiled at the same time; others wait.
const MOST_AT_ONCE: usize = 4;

/// What a grammar may cost. The units are the library's; see there.
fn limits() -> ParserLimits {
    ParserLimits {
        // Some four for each property that may come next.
        max_items_in_row: 10_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        // One to two KiB each, for each text that is being generated.
        max_lexer_states: 50_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        // They would show clients what was generated.
        verbose_errors: false,
    }
}

/// Compiles grammars for one vocabulary.
pub(super) struct Compiler {
    factory: ParserFactory,
    running: Mutex<usize>,
    finished: Condvar,
}

impl Compiler {
    pub fn new(vocabulary: &TokEnv) -> Result<Self, GrammarError> {
        let factory = panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| ParserFactory::new_simple(vocabulary)));
        let mut factory = factory.map_err(|e| GrammarError::Vocabulary { reason: reason(&e.to_string()) })?;
        *factory.limits_mut() = limits();
        factory.quiet();
        Ok(Self { factory, running: Mutex::new(0), finished: Condvar::new() })
    }

    /// Compiles a grammar, or says why it cannot be.
    pub fn compile(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut running = self
            .finished
            .wait_while(running, |running| *running >= MOST_AT_ONCE)
            .unwrap_or_else(PoisonError::into_inner);
        *running += 1;
        drop(running);
        let matcher = self.compile_apart(grammar);
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.finished.notify_one();
        matcher
    }

    /// Compiles on a thread of its own, since the caller's stack may be small.
    fn compile_apart(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let compile = || {
            let mut matcher = Matcher::new(self.factory.create_parser(grammar));
            // What contradicts itself shows here, and the lexer does its first work.
            matcher.compute_mask().map(|_| matcher).map_err(|error| reason(&error.to_string()))
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("grammar".into()).stack_size(STACK);
            let thread =
                thread.spawn_scoped(scope, compile).map_err(|error| format!("no thread to compile on: {error}"))?;
            thread.join().unwrap_or_else(|_| Err("the compiler failed".into()))
        })
    }
}
