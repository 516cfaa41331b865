//! Frames made up from a shape: to test and to measure views at sizes that no test machine runs.

use std::collections::{BTreeMap, VecDeque};

use moewe_plan::{
    Cost, FrameTensor, FrameToken, ModelInfo, Numbers, RunTimes, TOP_TOKENS, TapChoice, TapFrame, TapGroup,
};

use crate::source::{Command, Event, Source, Status};
use crate::store::{SequenceInfo, Token};
use crate::subject::{StepInfo, Subject};

/// Tokens of a frame.
const FRAME_TOKENS: u32 = 64;
/// Words that made-up tokens stand for.
const WORDS: [&str; 12] = [" the", " king", " said", " to", " let", " mut", " fn", " x", "1", "+", "=", ".\n"];

/// How large the made-up model and its texts are.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Layers; the first is dense.
    pub layers: u32,
    /// Routed experts, and how many a token is given.
    pub experts: (u32, u32),
    /// Groups, and how many a token may choose from.
    pub groups: (u32, u32),
    /// Attention heads.
    pub heads: u32,
    /// Numbers of a latent and of the rotated key.
    pub latent: (u32, u32),
    /// Numbers of a hidden state.
    pub hidden: u32,
    /// Tokens of each text, by its name; each name has experts of its own.
    pub texts: Vec<(String, u32)>,
    /// What is shown of them.
    pub taps: TapChoice,
}

impl Shape {
    /// Small enough for any test: 4 layers, 32 experts, three texts of 96 tokens.
    pub fn small() -> Self {
        Self {
            layers: 4,
            experts: (32, 4),
            groups: (4, 2),
            heads: 4,
            latent: (16, 8),
            hidden: 24,
            texts: ["bible", "rust", "math"].map(|name| (name.to_owned(), 96)).to_vec(),
            taps: TapChoice::all(),
        }
    }

    /// DeepSeek-V3's 61 layers and 256 experts over 4,096 tokens.
    pub fn full() -> Self {
        Self {
            layers: 61,
            experts: (256, 8),
            groups: (8, 4),
            heads: 128,
            latent: (512, 64),
            hidden: 7168,
            texts: vec![("bible".into(), 2048), ("rust".into(), 2048)],
            taps: "routing,latents:3,attention:3,hidden:3,logits,timing".parse().expect("groups and layers"),
        }
    }

    /// What is watched.
    pub fn subject(&self) -> Subject {
        let (experts, top_k) = self.experts;
        let model = ModelInfo {
            architecture: "DeepseekV3ForCausalLM".into(),
            checkpoint: "synthetic".into(),
            vocab_size: WORDS.len() as u32,
            max_context: 1 << 16,
            eos_token_ids: Vec::new(),
            layers: self.layers,
            moe_layers: (1..self.layers).collect(),
            experts,
            num_experts_per_tok: top_k,
            n_group: self.groups.0,
            topk_group: self.groups.1,
            n_shared_experts: 1,
            hidden_size: self.hidden,
            num_attention_heads: self.heads,
            kv_lora_rank: self.latent.0,
            qk_rope_head_dim: self.latent.1,
            qk_nope_head_dim: 128,
            v_head_dim: 128,
            softmax_scale: 0.1,
            mtp_modules: 1,
        };
        let step = |layer: u32, kernel: &str, bytes: u64| StepInfo {
            label: format!("layers.{layer}.{kernel}"),
            layer: Some(layer),
            kernel: kernel.into(),
            cost: Cost { fixed_bytes: bytes, token_bytes: bytes / 16, ..Cost::default() },
        };
        let steps = (0..self.layers).flat_map(|layer| {
            [
                step(layer, "latent_attention", 1 << 16),
                step(layer, "router", 1 << 12),
                step(layer, "experts_down", 1 << 20),
            ]
        });
        Subject {
            name: "synthetic".into(),
            model,
            precision: "exact".into(),
            device: "made up".into(),
            bytes_per_second: Some(1e9),
            programs: vec![steps.collect()],
            expert_bias: (1..self.layers)
                .map(|layer| (layer, (0..experts).map(|e| ((e * 7 + layer) % 11) as f32 * 0.01).collect()))
                .collect::<BTreeMap<_, _>>(),
            pieces: WORDS.map(str::to_owned).to_vec(),
        }
    }

    /// Everything that happens, in order.
    pub fn events(&self) -> impl Iterator<Item = Event> + '_ {
        let frames = |tokens: u32| u64::from(tokens.div_ceil(FRAME_TOKENS));
        (0..self.texts.len() as u32).flat_map(move |text| {
            let (name, tokens) = &self.texts[text as usize];
            let first: u64 = self.texts[..text as usize].iter().map(|(_, tokens)| frames(*tokens)).sum();
            let info = SequenceInfo {
                number: text,
                name: name.clone(),
                prompt_tokens: (tokens / 4).max(1),
                ..SequenceInfo::default()
            };
            let prompt = info.prompt_tokens;
            let of_frame = move |(number, start): (u64, u32)| {
                let end = (start + FRAME_TOKENS).min(*tokens);
                let written = (start..end).map(move |at| Event::Token {
                    sequence: text,
                    token: Token { id: token(text, at), generated: at >= prompt },
                });
                written.chain(std::iter::once(Event::Frame(self.frame(number, text, start..end))))
            };
            let numbered = (first..).zip((0..*tokens).step_by(FRAME_TOKENS as usize));
            let end = Event::End { sequence: text, reason: "length".into(), tokens_per_second: 100.0 };
            std::iter::once(Event::Begin(info)).chain(numbered.flat_map(of_frame)).chain(std::iter::once(end))
        })
    }

    fn frame(&self, number: u64, text: u32, positions: std::ops::Range<u32>) -> TapFrame {
        let mut frame = TapFrame { number, ..TapFrame::default() };
        let positions: Vec<u32> = positions.collect();
        frame.tokens = positions
            .iter()
            .map(|&position| FrameToken { sequence: text, position, id: token(text, position) })
            .collect();
        let mut add = |name: String, group, layer, columns: u32, number: &mut dyn FnMut(u32, u32) -> f32| {
            if self.taps.wants(group, layer) {
                let cells = positions.iter().flat_map(|&at| (0..columns).map(move |column| (at, column)));
                let data: Vec<f32> = cells.map(|(at, column)| number(at, column)).collect();
                let data = if name.ends_with("ids") {
                    Numbers::U32(data.into_iter().map(|id| id as u32).collect())
                } else {
                    Numbers::F32(data)
                };
                frame.tensors.push(FrameTensor { name: name.into(), group, layer, columns, data });
            }
        };
        let (experts, top_k) = self.experts;
        let top = TOP_TOKENS.min(WORDS.len() as u32);
        let halving = |column: u32| 0.5f32.powi(column as i32 + 1);
        for layer in 0..self.layers {
            let at = Some(layer);
            if layer > 0 {
                let ids = &mut |position, column| self.expert(text, layer, position, column) as f32;
                add(format!("moe.{layer}.ids"), TapGroup::Routing, at, top_k, ids);
                add(format!("moe.{layer}.weights"), TapGroup::Routing, at, top_k, &mut |_, c| 2.5 * halving(c));
                let logits = &mut |position, e| noise(&[text, layer, position, e]) - 3.0;
                add(format!("moe.{layer}.router_logits"), TapGroup::Scores, at, experts, logits);
            }
            let (rank, rope) = self.latent;
            let own = |kind: u32| {
                move |position, column| {
                    noise(&[kind, text, layer, position, column]) - 0.5 + 3.0 * f32::from(column == text)
                }
            };
            add(format!("mla.{layer}.c_kv"), TapGroup::Latents, at, rank, &mut own(1));
            add(format!("mla.{layer}.k_rope"), TapGroup::Latents, at, rope, &mut own(2));
            add(format!("mla.{layer}.query"), TapGroup::Attention, at, self.heads * (rank + rope), &mut own(3));
            add(format!("hidden.{}", layer + 1), TapGroup::Hidden, at, self.hidden, &mut own(4));
            let sure = layer as f32 / self.layers as f32;
            let ids = &mut |position, column| ((token(text, position + 1) + column * (1 + layer % 3)) % 12) as f32;
            add(format!("lens.{layer}.ids"), TapGroup::Lens, at, top, ids);
            add(format!("lens.{layer}.probs"), TapGroup::Lens, at, top, &mut |_, c| sure * halving(c));
            let stats =
                &mut |_, c: u32| [2.0 * (1.0 - sure), (sure + 0.01).ln(), (4.0 * (1.0 - sure)).floor()][c as usize];
            add(format!("lens.{layer}.stats"), TapGroup::Lens, at, 3, stats);
        }
        let ids = &mut |position, column| ((token(text, position + 1) + column) % 12) as f32;
        add("logits.ids".into(), TapGroup::Logits, None, top, ids);
        add("logits.probs".into(), TapGroup::Logits, None, top, &mut |_, column| halving(column));
        let stats = &mut |position, c: u32| {
            [noise(&[position]), -3.0 * noise(&[5, position]), (position % 3) as f32][c as usize]
        };
        add("logits.stats".into(), TapGroup::Logits, None, 3, stats);
        let wrong = |position: u32| u32::from(position.is_multiple_of(4));
        add("mtp.1.ids".into(), TapGroup::Mtp, None, top, &mut |p, c| {
            ((token(text, p + 1) + wrong(p) + c) % 12) as f32
        });
        add("mtp.1.probs".into(), TapGroup::Mtp, None, top, &mut |_, column| halving(column));
        if self.taps.timing {
            let steps = self.layers as usize * 3;
            let durations: Vec<u64> = (0..steps as u64).map(|step| 20_000 + 137 * (step * 31 % 101)).collect();
            let starts = durations.iter().scan(0, |at, duration| {
                *at += duration + 2_000;
                Some(Some(*at - duration))
            });
            frame.times = Some(RunTimes { program: 0, rows: 1, starts: starts.collect(), durations });
        }
        frame
    }

    /// The expert that a token is given: each text prefers experts of its own groups.
    fn expert(&self, text: u32, layer: u32, position: u32, choice: u32) -> u32 {
        let (experts, top_k) = self.experts;
        let liked = noise(&[9, text, layer, position]).powi(2);
        let first = (text * experts / 3 + layer * 5 + (liked * experts as f32 / 4.0) as u32) % experts;
        (first + choice * (experts / top_k / 2).max(1)) % experts
    }
}

fn token(text: u32, position: u32) -> u32 {
    text * 4 + (noise(&[text, position]) * 4.0) as u32 % 4
}

/// A number from 0 to 1 that looks random and is always the same for the same keys.
fn noise(keys: &[u32]) -> f32 {
    let mix = |hash: u64, key: &u32| (hash ^ u64::from(*key)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let hash = keys.iter().fold(0x2545_f491_4f6c_dd1d, mix).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (hash >> 40) as f32 / (1u64 << 24) as f32
}

/// A source of made-up frames.
pub struct Synthetic {
    events: VecDeque<Event>,
}

impl Synthetic {
    /// All that a shape has, to be handed out a bit at a time.
    pub fn new(shape: &Shape) -> Self {
        Self { events: shape.events().collect() }
    }
}

impl Source for Synthetic {
    fn poll(&mut self) -> Vec<Event> {
        let count = self.events.len().min(1024);
        self.events.drain(..count).collect()
    }

    fn send(&mut self, _command: Command) {
        self.events.push_back(Event::Error("made-up frames cannot be changed".into()));
    }

    fn status(&self) -> Status {
        Status { busy: !self.events.is_empty(), ..Status::default() }
    }

    fn set_wake(&mut self, _wake: Box<dyn Fn() + Send + Sync>) {}
}

/// A store that has seen all of a shape.
pub fn store(shape: &Shape) -> crate::store::Store {
    let mut store = crate::store::Store::new(shape.experts.0, 512 << 20);
    for event in shape.events() {
        store.apply(event);
    }
    store
}
