//! The window that explains keys and words.

use egui::{Context, Layout, ScrollArea, Window, vec2};

use super::App;

/// Room for a key or a word, in points.
const TERM_WIDTH: f32 = 140.0;

/// Words of mixtures of experts and latent attention, a plain sentence each.
const GLOSSARY: &[(&str, &str)] = &[
    ("token", "A piece of text, often a word or part of one: what the model reads and writes one at a time."),
    ("layer", "One of the steps through which every token's numbers go, from the input (layer 0) to the prediction."),
    ("expert", "One of many small networks in a layer, of which each token uses only a few."),
    ("shared expert", "An expert that every token of the layer uses, beside those that the router chooses."),
    (
        "router",
        "The part of a layer that scores all experts for a token, chooses the best few and says how much each counts.",
    ),
    ("group", "Experts that stand together, usually on one device: a token may choose only from its best groups."),
    ("correction bias", "A number added to each expert's score when choosing, and only then, to keep the load even."),
    ("load", "How many tokens an expert was given."),
    ("balancedness", "Mean load divided by the largest: 1 when all work alike, near 0 when one does everything."),
    (
        "entropy",
        "How undecided a choice is, in nats or bits: 0 when it is certain, larger when many are about as likely.",
    ),
    ("head", "One of the parallel parts of attention: each looks for something else in the text before."),
    (
        "latent",
        "The short list of numbers that attention keeps of each token instead of keys and values for every head.",
    ),
    ("absorbed query", "A head's question, rewritten so that it can be compared with latents directly."),
    (
        "logit lens",
        "What the model would predict if it stopped behind a layer: the final head applied to that layer's state.",
    ),
    ("MTP", "Multi-token prediction: a small extra module that drafts the token after the next one."),
    ("surprise", "How unexpected a token was: minus the logarithm of the probability that the model gave it."),
];

#[derive(Default)]
pub(super) struct Help {
    pub(super) is_open: bool,
}

pub(super) fn ui(app: &mut App, ctx: &Context) {
    let mut is_open = app.help.is_open;
    let window = Window::new("Keys and words").open(&mut is_open).default_width(620.0).collapsible(false);
    window.default_pos([320.0, 90.0]).show(ctx, |ui| {
        ScrollArea::vertical().max_height(500.0).show(ui, |ui| {
            ui.heading("Keys");
            table(ui, super::keys::KEYS);
            ui.add_space(8.0);
            ui.heading("Views");
            let views: Vec<(String, &str)> = app
                .views
                .iter()
                .enumerate()
                .map(|(i, view)| {
                    let title = super::panes::title(view.name());
                    (if i < 9 { format!("{}  {title}", i + 1) } else { format!("    {title}") }, view.about())
                })
                .collect();
            let views: Vec<(&str, &str)> = views.iter().map(|(name, about)| (name.as_str(), *about)).collect();
            table(ui, &views);
            ui.add_space(8.0);
            ui.heading("Words");
            table(ui, GLOSSARY);
        });
    });
    app.help.is_open &= is_open;
}

fn table(ui: &mut egui::Ui, rows: &[(&str, &str)]) {
    for (term, about) in rows {
        ui.horizontal_top(|ui| {
            let width = vec2(TERM_WIDTH, 0.0);
            ui.allocate_ui_with_layout(width, Layout::top_down(egui::Align::Min), |ui| {
                ui.set_min_width(TERM_WIDTH);
                ui.strong(*term);
            });
            ui.add(egui::Label::new(*about).wrap());
        });
    }
}
