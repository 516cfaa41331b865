//! Runs the candidates of a case on the device: verifies each, then times them in turn.

use std::collections::HashMap;
use std::sync::Arc;

use moewe_compiler::graph::{Op, TensorType};
use moewe_compiler::lower::{Bench as Compiler, Lowered};
use moewe_compiler::profile::Profile;
use moewe_plan::{Binding, Buffer, DType, PAGE_TOKENS, Role, Step, Symbols};
use moewe_runtime::Error::{BufferTooLarge, Kernel, OutOfMemory};
use moewe_runtime::{Bench, DeviceType, Dispatch, Gpu, Store};

use super::cases::{Case, Load};
use super::check::{Run, UNTOUCHED, needed};
use super::choose::{Measure, Verdict};
use super::data::{Numbers, Random, slice_words};
use super::{Error, Result};

/// Words behind the end of buffers: kernels must leave them alone, and must not read them.
const GUARD: u64 = 64;
/// Most copies of the weights of a case.
const COPIES: u64 = 16;
/// A candidate that was timed for so many seconds, at least three times, is known well enough.
const ENOUGH: f64 = 1.0;
/// A candidate that takes this much longer than the best at first is not timed again.
const HOPELESS: f64 = 2.0;

/// What was found out about a candidate that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The case.
    pub case: String,
    /// Its kernels.
    pub variant: String,
    /// What is wrong.
    pub why: String,
}

/// A device, and the cases that run on it.
pub struct Device<'a> {
    compiler: &'a Compiler<'a>,
    bench: Bench,
    cases: &'a [Case],
    load: Load,
    /// Times that each candidate is timed.
    rounds: usize,
    /// Seconds that one of these times takes at least.
    least: f64,
    /// Bytes of weights that runs go through before they come back to the first: more than caches hold.
    weights: u64,
    /// Candidates that disagreed with the oracle or were refused by the device.
    pub dropped: Vec<Dropped>,
}

/// A candidate on the device.
struct Rig {
    lowered: Lowered,
    /// One for each copy of the weights; the steps that are timed.
    chains: Vec<Vec<Dispatch>>,
    /// Kept alive for them, by their indices.
    stores: Vec<Option<Store>>,
}

/// Weights on the device, by index and shard; for each copy.
type Weights = Vec<Vec<Vec<Store>>>;

impl<'a> Device<'a> {
    /// On an open device.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn new(compiler: &'a Compiler, gpu: &Arc<Gpu>, cases: &'a [Case], load: Load, quick: bool) -> Result<Self> {
        let software = gpu.info().device_type == DeviceType::Cpu;
        Ok(Self {
            compiler,
            bench: Bench::new(gpu)?,
            cases,
            load,
            rounds: if quick { 3 } else { 7 },
            least: if software { 4e-3 } else { 1e-3 },
            weights: if software { 32 << 20 } else { 192 << 20 },
            dropped: Vec::new(),
        })
    }

    /// The kernels that a profile gives a case, in the order in which they run.
    ///
    /// # Errors
    /// A profile whose limits are too small.
    pub fn variant(&self, case: usize, profile: &Profile) -> Result<String> {
        Ok(variant(&self.lower(case, profile)?))
    }

    fn lower(&self, case: usize, profile: &Profile) -> Result<Lowered> {
        let case = &self.cases[case];
        Ok(self.compiler.lower(profile, case.tokens == 1, &case.nodes)?)
    }

    fn symbols(&self, case: &Case) -> Symbols {
        let pages = self.last_position(case).div_ceil(PAGE_TOKENS as usize) + 1;
        Symbols { tokens: case.tokens as u64, rows: 1, sequences: 1, pages: pages as u64 }
    }

    /// Position of the last token of a case.
    fn last_position(&self, case: &Case) -> usize {
        if case.tokens == 1 { self.load.context - 1 } else { case.tokens - 1 }
    }

    /// Where the pages of the one sequence stand: in reverse, so that their order matters.
    fn page_table(&self, case: &Case) -> Vec<u32> {
        (0..self.symbols(case).pages as u32).rev().collect()
    }

    /// Puts weights on the device.
    fn weights(&self, lowered: &Lowered, numbers: &Numbers) -> Result<Weights> {
        let words: u64 =
            lowered.weights.iter().map(|w| slice_words(w) * w.shards.iter().map(|s| s.count).sum::<u64>()).sum();
        let copies = (self.weights / (4 * words).max(1) + 1).min(COPIES);
        let copy = |_| {
            let weights = lowered.weights.iter().zip(0..).map(|(weight, index)| {
                let shards = weight.shards.iter().map(|shard| {
                    let words = shard.count * slice_words(weight);
                    let store = self.bench.store(&weight.name, words + GUARD, false)?;
                    // What is read there is NaN.
                    self.bench.write(&store, words, &[u32::MAX; GUARD as usize])?;
                    self.bench.repeat(&store, words, &numbers.of(index).pattern)?;
                    Ok(store)
                });
                shards.collect::<Result<Vec<_>>>()
            });
            weights.collect::<Result<Vec<_>>>()
        };
        (0..copies).map(copy).collect()
    }

    /// Puts a candidate on the device.
    fn rig(&mut self, case: usize, lowered: Lowered, weights: &Weights) -> Result<Rig> {
        let case = &self.cases[case];
        let symbols = self.symbols(case);
        let mut stores: Vec<Option<Store>> = lowered.buffers.iter().map(|_| None).collect();
        for (index, buffer) in lowered.buffers.iter().enumerate() {
            let words = buffer.elements.eval(&symbols);
            let uniform = buffer.role == Role::Header;
            let store = self.bench.store(&buffer.name, if uniform { words } else { words + GUARD }, uniform)?;
            let ty = self.input(case, &lowered, index as u32);
            self.bench.write(&store, 0, &self.contents(case, buffer, words, ty))?;
            if !uniform {
                self.bench.write(&store, words, &[UNTOUCHED; GUARD as usize])?;
            }
            stores[index] = Some(store);
        }
        let mut chains = Vec::new();
        for copy in weights {
            let mut chain = Vec::new();
            for (_, step) in &lowered.steps {
                chain.push(self.dispatch(&lowered, step, copy, &stores, &symbols)?);
            }
            chains.push(chain);
        }
        // The first run has all steps.
        self.bench.run(&chains[0])?;
        let timed = &case.nodes[case.prepared..];
        for chain in &mut chains {
            let mut steps = lowered.steps.iter();
            chain.retain(|_| steps.next().is_some_and(|(node, _)| timed.contains(node)));
        }
        Ok(Rig { lowered, chains, stores })
    }

    fn dispatch(
        &mut self,
        lowered: &Lowered,
        step: &Step,
        weights: &[Vec<Store>],
        stores: &[Option<Store>],
        symbols: &Symbols,
    ) -> Result<Dispatch> {
        let store = |buffer: u32| stores[buffer as usize].as_ref().expect("all were made");
        let params = self.bench.store("parameters", 4, true)?;
        self.bench.write(&params, 0, &step.params)?;
        let bound = step.bindings.iter().map(|binding| match *binding {
            Binding::Buffer(buffer) => store(buffer),
            Binding::Weight { weight, shard } => &weights[weight as usize][shard as usize],
            Binding::Params => &params,
        });
        let bound: Vec<&Store> = bound.collect();
        let (kernel, source) = (&lowered.kernels[step.kernel as usize], &lowered.sources[step.kernel as usize]);
        let grid = [0, 1, 2].map(|axis| step.grid[axis].eval(symbols) as u32);
        let indirect = step.indirect.map(|indirect| (store(indirect.buffer), indirect.word));
        Ok(self.bench.dispatch(kernel, source, &bound, grid, indirect)?)
    }

    /// The type of the value in a buffer, if it comes from outside the case.
    fn input(&self, case: &Case, lowered: &Lowered, buffer: u32) -> Option<&TensorType> {
        let graph = self.compiler.graph();
        let value = lowered.values.iter().find(|(_, index)| **index == buffer).map(|(value, _)| *value)?;
        (!case.nodes.contains(&value.node)).then(|| graph.ty(value))
    }

    /// What stands in a buffer before a run.
    fn contents(&self, case: &Case, buffer: &Buffer, words: u64, input: Option<&TensorType>) -> Vec<u32> {
        let mut random = Random::named(0, &buffer.name);
        match (buffer.role, input) {
            (Role::Header, _) => vec![case.tokens as u32, 1, 0, 0, 0, 0, 0, 0],
            (Role::Tokens, _) => {
                let first = self.last_position(case) + 1 - case.tokens;
                (0..case.tokens).flat_map(|token| [9, (first + token) as u32, 0, 0]).collect()
            }
            (Role::PageTable, _) => {
                let mut table = self.page_table(case);
                table.resize(words as usize, u32::MAX);
                table
            }
            (_, Some(ty)) if ty.dtype == DType::U32 => {
                (0..case.tokens).flat_map(|_| self.experts(case, ty.row_len(), &mut random)).collect()
            }
            (Role::Cache, _) | (_, Some(_)) => (0..words).map(|_| random.number()).collect(),
            // Counts of the router must begin with zero; what else kernels share they write first.
            (Role::Scratch, None) if buffer.dtype == DType::U32 && !buffer.name.starts_with("value") => {
                vec![0; words as usize]
            }
            _ => vec![UNTOUCHED; words as usize],
        }
    }

    /// Distinct experts for a token.
    fn experts(&self, case: &Case, count: usize, random: &mut Random) -> Vec<u32> {
        let graph = self.compiler.graph();
        let weight = case.nodes.iter().find_map(|&node| match graph.nodes[node].op {
            Op::ExpertGateUp { gate, .. } => Some(gate),
            Op::ExpertDown { weight } => Some(weight),
            _ => None,
        });
        let weight = &graph.weights[weight.expect("only experts have ids for inputs")];
        let routed = weight.experts.unwrap_or(0);
        let shared = weight.all_experts().unwrap_or(0) - routed;
        let mut all: Vec<u32> = (0..routed as u32).collect();
        for at in 0..count - shared {
            all.swap(at, at + random.below(routed - at));
        }
        all.truncate(count - shared);
        all.extend((0..shared).map(|nth| (routed + nth) as u32));
        all
    }

    /// Whether the run of a candidate gave what the oracle says; if not, where not.
    fn verify(&self, case: usize, rig: &Rig, numbers: &Numbers) -> Result<std::result::Result<(), String>> {
        let case = &self.cases[case];
        let (graph, symbols) = (self.compiler.graph(), self.symbols(case));
        let mut contents = HashMap::new();
        for (buffer, store) in rig.lowered.buffers.iter().zip(&rig.stores).filter(|(b, _)| b.role != Role::Header) {
            let words = buffer.elements.eval(&symbols);
            let store = store.as_ref().expect("all were made");
            if self.bench.read(store, words, GUARD)?.iter().any(|&word| word != UNTOUCHED) {
                return Ok(Err(format!("words behind the end of {} were written", buffer.name)));
            }
        }
        for &node in &case.nodes[case.prepared..] {
            for buffer in needed(graph, &rig.lowered, node) {
                let words = rig.lowered.buffers[buffer as usize].elements.eval(&symbols);
                let store = rig.stores[buffer as usize].as_ref().expect("all were made");
                contents.insert(buffer, self.bench.read(store, 0, words)?);
            }
        }
        let run = Run {
            graph,
            lowered: &rig.lowered,
            numbers,
            tokens: case.tokens,
            position: self.last_position(case) + 1 - case.tokens,
            pages: &self.page_table(case),
            contents,
        };
        Ok(case.nodes[case.prepared..].iter().try_for_each(|&node| run.check(node)))
    }

    /// Notes that a candidate is out.
    fn drop_candidate(&mut self, case: usize, variant: &str, why: String) -> Verdict {
        let Case { name, shape, tokens, .. } = &self.cases[case];
        let case = format!("{name} {shape}, {tokens} tokens");
        self.dropped.push(Dropped { case, variant: variant.to_owned(), why });
        Verdict::Wrong
    }
}

impl Measure for Device<'_> {
    fn times(&mut self, case: usize, profiles: &[Profile]) -> Result<Vec<Verdict>> {
        // Candidates that make no difference to this case are one.
        let mut variants: Vec<String> = Vec::new();
        let (mut rigs, mut verdicts, mut of) = (Vec::new(), Vec::new(), Vec::new());
        let mut weights: Option<(Numbers, Weights)> = None;
        for profile in profiles {
            let lowered = match self.lower(case, profile) {
                Ok(lowered) => lowered,
                // Limits of the profile that a kernel exceeds: not a legal candidate.
                Err(Error::Compile(_)) => {
                    of.push(None);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let name = identity(&lowered);
            if let Some(at) = variants.iter().position(|known| *known == name) {
                of.push(Some(at));
                continue;
            }
            of.push(Some(variants.len()));
            variants.push(name);
            if weights.is_none() {
                let tensors: Vec<_> = lowered.tensors.values().copied().collect();
                let numbers = Numbers::new(&lowered.weights, &tensors, 0);
                let stores = self.weights(&lowered, &numbers)?;
                weights = Some((numbers, stores));
            }
            let (numbers, stores) = weights.as_ref().expect("made above");
            let variant = variant(&lowered);
            let (rig, verdict) = match self.rig(case, lowered, stores) {
                Ok(rig) => match self.verify(case, &rig, numbers)? {
                    Ok(()) => (Some(rig), Verdict::Seconds(f64::INFINITY)),
                    Err(why) => (None, self.drop_candidate(case, &variant, why)),
                },
                Err(Error::Run(error @ Kernel { .. })) => {
                    (None, self.drop_candidate(case, &variant, error.to_string()))
                }
                // All candidates have buffers at once.
                Err(Error::Run(error @ (OutOfMemory { .. } | BufferTooLarge { .. }))) if !rigs.is_empty() => {
                    (None, self.drop_candidate(case, &variant, error.to_string()))
                }
                Err(error) => return Err(error),
            };
            rigs.push(rig);
            verdicts.push(verdict);
        }
        self.time(&rigs, &mut verdicts)?;
        Ok(of.into_iter().map(|at| at.map_or(Verdict::Illegal, |at| verdicts[at])).collect())
    }
}

impl Device<'_> {
    /// Times candidates in turn (A B C A B C …) and notes the median of each.
    fn time(&self, rigs: &[Option<Rig>], verdicts: &mut [Verdict]) -> Result<()> {
        let mut samples: Vec<Vec<f64>> = vec![Vec::new(); rigs.len()];
        let mut times = vec![1; rigs.len()];
        for (at, rig) in rigs.iter().enumerate() {
            let Some(rig) = rig else { continue };
            // What is done for the first time takes longer.
            let once = self.bench.time(&rig.chains, 1)?.min(self.bench.time(&rig.chains, 1)?);
            times[at] = (self.least / once.max(1e-9)).ceil().clamp(1.0, 256.0) as usize;
            samples[at].push(self.bench.time(&rig.chains, times[at])?);
        }
        let best = samples.iter().flatten().copied().fold(f64::INFINITY, f64::min);
        for _ in 1..self.rounds {
            for (at, rig) in rigs.iter().enumerate() {
                if let Some(rig) = rig
                    && samples[at][0] <= HOPELESS * best
                    && (samples[at].len() < 3 || samples[at].iter().sum::<f64>() * (times[at] as f64) < ENOUGH)
                {
                    samples[at].push(self.bench.time(&rig.chains, times[at])?);
                }
            }
        }
        for (samples, verdict) in samples.iter_mut().zip(verdicts) {
            if !samples.is_empty() {
                samples.sort_by(f64::total_cmp);
                *verdict = Verdict::Seconds(samples[samples.len() / 2]);
            }
        }
        Ok(())
    }
}

/// The names of kernels in the order in which they run, each once.
fn variant(lowered: &Lowered) -> String {
    let names: Vec<&str> = lowered.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
    names.join(" ")
}

/// What tells two candidates apart.
fn identity(lowered: &Lowered) -> String {
    let steps = lowered.steps.iter().map(|(_, step)| format!("{} {:?} {:?}", step.kernel, step.grid, step.params));
    format!("{} {}", variant(lowered), steps.collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use moewe_compiler::checkpoint::Checkpoint;
    use moewe_runtime::Selector;

    use super::super::cases::cases;
    use super::*;

    /// Every case of a model agrees with the oracle, and with an oracle that has other weights none does.
    #[test]
    fn what_disagrees_with_the_oracle_is_found() {
        let gpu =
            Gpu::open(&Selector::Default).unwrap_or_else(|error| panic!("this test needs a Vulkan device: {error}"));
        let start = Profile::load("generic-vulkan").unwrap();
        for model in ["v3-tiny", "v2-lite-tiny", "v3-fp8-tiny"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(model);
            let checkpoint = Checkpoint::open(&dir).unwrap();
            let bench = Compiler::new(&checkpoint).unwrap();
            let load = Load { prompt: 19, context: 100 };
            let cases = cases(&bench, &start, load).unwrap();
            assert!(cases.len() >= 15, "{model}: only {} cases", cases.len());
            let mut device = Device::new(&bench, &gpu, &cases, load, true).unwrap();
            for (at, case) in cases.iter().enumerate() {
                let lowered = device.lower(at, &start).unwrap();
                let tensors: Vec<_> = lowered.tensors.values().copied().collect();
                let [right, wrong] = [0, 1].map(|seed| Numbers::new(&lowered.weights, &tensors, seed));
                let weights = device.weights(&lowered, &right).unwrap();
                let rig = device.rig(at, lowered, &weights).unwrap();
                let what = format!("{model}: {} {}, {} tokens", case.name, case.shape, case.tokens);
                device.verify(at, &rig, &right).unwrap().unwrap_or_else(|why| panic!("{what}: {why}"));
                // Attention has no weights.
                let found = device.verify(at, &rig, &wrong).unwrap();
                assert_eq!(found.is_err(), case.name != "attention", "{what}: other weights went unnoticed");
            }
        }
    }

    /// A kernel that writes behind the end of a buffer is found, whatever it computed.
    #[test]
    fn words_behind_the_end_are_looked_at() {
        let gpu =
            Gpu::open(&Selector::Default).unwrap_or_else(|error| panic!("this test needs a Vulkan device: {error}"));
        let start = Profile::load("generic-vulkan").unwrap();
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v3-tiny");
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let bench = Compiler::new(&checkpoint).unwrap();
        let load = Load { prompt: 8, context: 8 };
        let cases = cases(&bench, &start, load).unwrap();
        let mut device = Device::new(&bench, &gpu, &cases, load, true).unwrap();
        let lowered = device.lower(0, &start).unwrap();
        let tensors: Vec<_> = lowered.tensors.values().copied().collect();
        let numbers = Numbers::new(&lowered.weights, &tensors, 0);
        let weights = device.weights(&lowered, &numbers).unwrap();
        let rig = device.rig(0, lowered, &weights).unwrap();
        assert_eq!(device.verify(0, &rig, &numbers).unwrap(), Ok(()));
        let (buffer, store) =
            rig.lowered.buffers.iter().zip(&rig.stores).find(|(b, _)| b.role == Role::Scratch).unwrap();
        let words = buffer.elements.eval(&device.symbols(&cases[0]));
        device.bench.write(store.as_ref().unwrap(), words + 3, &[0]).unwrap();
        let why = device.verify(0, &rig, &numbers).unwrap().unwrap_err();
        assert!(why.contains("behind the end"), "{why}");
    }
}
