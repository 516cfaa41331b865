//! Arguments of watching: what is recorded, what is changed, and `moewe view`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use moewe_plan::{Edit, Place, TapChoice};

use super::{ModelArgs, SamplingArgs, token_id};

/// What is watched, and where it goes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Watching")]
pub struct WatchArgs {
    /// Write what experts and latents do to FILE while generating; `moewe view FILE` shows it. An existing recording of
    /// the same model goes on
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,

    /// What to record: routing, scores, latents, hidden, attention, logits, lens, mtp, timing, each also for one layer as in
    /// latents:3; all, or none
    #[arg(long, value_name = "GROUPS", default_value = "all", value_parser = taps, requires = "record")]
    pub taps: TapChoice,
}

/// Changes to the model. They need no new compilation.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Changing the model")]
pub struct EditArgs {
    /// Take an expert out: LAYER:EXPERT, or *:EXPERT for all layers; may be given several times, as all of these
    #[arg(long, value_name = "L:E", value_parser = place)]
    pub mute: Vec<Place>,
    /// Choose an expert for every token
    #[arg(long, value_name = "L:E", value_parser = place)]
    pub force: Vec<Place>,
    /// Multiply what an expert adds
    #[arg(long, value_name = "L:E=FACTOR", value_parser = Edit::parse_scale)]
    pub scale: Vec<Edit>,
    /// Choose exactly these experts for every token
    #[arg(long, value_name = "L:E+E+…", value_parser = Edit::parse_pin)]
    pub pin: Vec<Edit>,
    /// Zero a number of the latent
    #[arg(long, value_name = "L:N", value_parser = place)]
    pub zero_latent: Vec<Place>,
    /// Zero what an attention head gives
    #[arg(long, value_name = "L:H", value_parser = place)]
    pub zero_head: Vec<Place>,
}

impl EditArgs {
    /// All of them.
    pub fn edits(&self) -> Vec<Edit> {
        let places = |places: &[Place], edit: fn(Place) -> Edit| places.iter().map(|&place| edit(place)).collect();
        let parts: [Vec<Edit>; 6] = [
            places(&self.mute, Edit::Mute),
            places(&self.force, Edit::Force),
            self.scale.clone(),
            self.pin.clone(),
            places(&self.zero_latent, Edit::ZeroLatent),
            places(&self.zero_head, Edit::ZeroHead),
        ];
        parts.concat()
    }
}

fn place(text: &str) -> Result<Place, String> {
    text.parse()
}

pub(super) fn taps(text: &str) -> Result<TapChoice, String> {
    text.parse()
}

/// Taps, and the words that chose them.
#[derive(Clone, Debug)]
pub struct Taps {
    /// As given.
    pub words: String,
    /// What they mean.
    pub choice: TapChoice,
}

impl Taps {
    fn of(words: &str) -> Result<Self, String> {
        Ok(Self { words: words.to_owned(), choice: taps(words)? })
    }
}

/// Light or dark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ThemeArg {
    /// Dark
    Dark,
    /// Light
    Light,
}

/// Width and height in points.
fn size(text: &str) -> Result<[u32; 2], String> {
    let wrong = || format!("{text:?}: expected WIDTHxHEIGHT, such as 1280x800, each from 200 to 8000");
    let (width, height) = text.split_once('x').ok_or_else(wrong)?;
    let side = |text: &str| text.parse().ok().filter(|side| (200..=8000).contains(side)).ok_or_else(wrong);
    Ok([side(width)?, side(height)?])
}

/// `moewe view`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    moewe view models/demo --prompt \"The king said to\"\n  \
    moewe run models/demo \"The king said to\" --record king.moewe-rec && moewe view king.moewe-rec\n  \
    moewe view king.moewe-rec --view routing --layer 3 --screenshot routing.png\n  \
    moewe view king.moewe-rec --routed-experts routing.npz --chrome-trace time.json\n  \
    moewe serve models/demo --allow-watch & moewe view http://127.0.0.1:8080")]
pub struct ViewArgs {
    /// Recording, checkpoint directory, compiled bundle, or http://HOST:PORT of a `moewe serve --allow-watch`
    #[command(flatten)]
    pub model: ModelArgs,

    /// What opens a server: a file with a key, alone or as a line of the server's own --api-key-file [default: what
    /// MOEWE_API_KEY says]
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Text to run at once, with or without a name for it: TEXT or NAME=TEXT; may be given several times
    #[arg(long = "prompt", value_name = "[NAME=]TEXT")]
    pub prompts: Vec<String>,

    /// Token ids to run at once, separated by commas
    #[arg(
        long, value_name = "IDS", value_delimiter = ',', num_args = 1, value_parser = token_id,
        allow_hyphen_values = true
    )]
    pub tokens: Option<Vec<u32>>,

    /// Another recording to compare with
    #[arg(long, value_name = "FILE")]
    pub against: Option<PathBuf>,

    /// What to watch of a running model, as for `moewe run --taps` [default: all; of a server: routing]
    #[arg(long, value_name = "GROUPS", value_parser = Taps::of)]
    pub taps: Option<Taps>,

    /// Memory for what is shown, in MiB; the oldest goes when it is full
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(16..))]
    pub memory: u32,

    #[command(flatten)]
    pub place: PlaceArgs,

    #[command(flatten)]
    pub export: ExportArgs,

    #[command(flatten)]
    pub edits: EditArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// What is selected at the beginning.
#[derive(Args, Debug)]
#[command(next_help_heading = "Where to look")]
pub struct PlaceArgs {
    /// View to show: transcript, routing, expert, balance, latents, attention, depth, mtp, time, change, compare; a part of
    /// it as in routing:texts, balance:placement, latents:projection
    #[arg(long, value_name = "NAME[:PART]")]
    view: Option<String>,
    /// Text, by name or number [default: the first]
    #[arg(long, value_name = "TEXT")]
    pub text: Option<String>,
    /// Text to compare it with
    #[arg(long, value_name = "TEXT")]
    pub other: Option<String>,
    /// Token, by position
    #[arg(long, value_name = "N")]
    pub token: Option<u32>,
    /// Layer [default: the first with experts]
    #[arg(long, value_name = "N")]
    pub layer: Option<u32>,
    /// Expert
    #[arg(long, value_name = "N")]
    pub expert: Option<u32>,
    /// Attention head
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub head: u32,
    /// Colours of the window or picture [default: the window's last, pictures dark]
    #[arg(long, value_enum)]
    pub theme: Option<ThemeArg>,
    /// Colours of maps
    #[arg(long, value_enum, default_value_t)]
    pub palette: PaletteArg,
}

impl PlaceArgs {
    /// The view.
    pub fn view_name(&self) -> Option<&str> {
        self.view.as_deref().map(|view| view.split_once(':').map_or(view, |(name, _)| name))
    }

    /// The part of it.
    pub fn part(&self) -> Option<&str> {
        Some(self.view.as_deref()?.split_once(':')?.1)
    }
}

/// Colours of maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PaletteArg {
    /// Dark blue through green to yellow
    #[default]
    Viridis,
    /// Dark blue through grey to yellow, nearly the same to all people
    Cividis,
}

/// Files to write instead of opening a window.
#[derive(Args, Debug)]
#[command(next_help_heading = "Files instead of a window")]
pub struct ExportArgs {
    /// Picture of the whole window, or of --view alone
    #[arg(long, value_name = "PNG")]
    pub screenshot: Option<PathBuf>,
    /// Size of the picture in points
    #[arg(long, value_name = "WxH", default_value = "1280x800", value_parser = size, requires = "screenshot")]
    pub size: [u32; 2],
    /// Numbers of --view as CSV
    #[arg(long, value_name = "FILE", requires = "view")]
    pub csv: Option<PathBuf>,
    /// Numbers of --view as NumPy arrays
    #[arg(long, value_name = "NPZ", requires = "view")]
    pub npz: Option<PathBuf>,
    /// Times of all kernels for chrome://tracing or Perfetto
    #[arg(long, value_name = "JSON")]
    pub chrome_trace: Option<PathBuf>,
    /// Experts of every token of a text, int16 [tokens, layers, top_k]
    #[arg(long, value_name = "NPZ")]
    pub routed_experts: Option<PathBuf>,
    /// Load of all experts, as the EPLB algorithm takes it
    #[arg(long, value_name = "NPZ")]
    pub eplb: Option<PathBuf>,
    /// Replace files that exist
    #[arg(long)]
    pub overwrite: bool,
}

impl ExportArgs {
    /// Whether any file is asked for.
    pub fn is_any(&self) -> bool {
        let files = [&self.screenshot, &self.csv, &self.npz, &self.chrome_trace, &self.routed_experts, &self.eplb];
        files.into_iter().any(Option::is_some)
    }
}
