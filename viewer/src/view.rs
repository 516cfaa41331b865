//! What a view is.

use std::sync::Arc;

use crate::numbers::Table;
use crate::selection::Selection;
use crate::source::Command;
use crate::store::{Sequence, Store};
use crate::subject::Subject;

/// What a view sees, and where it puts what it wants.
pub struct Cx<'a> {
    /// The model.
    pub subject: &'a Arc<Subject>,
    /// What has been seen.
    pub store: &'a Store,
    /// What the user looks at; views change it when something is clicked.
    pub selection: &'a mut Selection,
    /// What the source is to do; views push.
    pub commands: &'a mut Vec<Command>,
    /// Whether the source can write new texts.
    pub is_live: bool,
    /// The colours of maps.
    pub palette: crate::colour::Palette,
}

impl Cx<'_> {
    /// The selected text.
    pub fn sequence(&self) -> Option<&Sequence> {
        self.store.sequence(self.selection.sequence)
    }

    /// The layers that are mixtures of experts.
    pub fn moe_layers(&self) -> &[u32] {
        &self.subject.model.moe_layers
    }
}

/// One view. Each is one file in [`crate::views`].
pub trait View {
    /// Its short name: on the tab, and in `--view NAME`.
    fn name(&self) -> &'static str;
    /// What it shows, in a sentence for a newcomer.
    fn about(&self) -> &'static str;
    /// Draws it. Nothing here may take long: see [`crate::jobs::Latest`].
    fn ui(&mut self, ui: &mut egui::Ui, cx: &mut Cx<'_>);
    /// The numbers that it shows, for CSV and npz. May take long.
    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table>;
    /// Names of its parts, if it has several; the first is shown at first. `--view NAME:PART` chooses another.
    fn parts(&self) -> &'static [&'static str] {
        &[]
    }
    /// Shows the part of this place in [`View::parts`].
    fn show_part(&mut self, _part: usize) {}
    /// Whether something is still being computed: a picture taken now would miss it.
    fn is_busy(&self) -> bool {
        false
    }
}
