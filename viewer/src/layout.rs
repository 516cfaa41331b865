//! Where the views stand: panes with tabs that can be dragged, split and hidden.

use egui_tiles::{Container, Linear, LinearDir, Tile, TileId, Tiles, Tree};

/// Views that stand alone above the others, and those of the left side; the rest become tabs on the right below.
const LEFT_ABOVE: &[&str] = &["transcript"];
const LEFT_BELOW: &[&str] = &["change", "compare"];
const RIGHT_ABOVE: &[&str] = &["routing"];
/// The tab that is open among those that share a place.
const FIRST: &str = "latents";
/// Containers around a pane at most; a kept layout that is deeper is not ours.
const MAX_DEPTH: usize = 32;

/// Panes, each of which shows the view of its name.
#[derive(Debug)]
pub struct Layout {
    pub(crate) tree: Tree<String>,
}

impl Layout {
    /// What a user sees first: the text on top of the panel for changes, routing on top of all others.
    pub fn standard(names: &[&str]) -> Self {
        let mut tiles = Tiles::default();
        let of = |wanted: &[&str]| -> Vec<String> {
            names.iter().filter(|name| wanted.contains(name)).map(|name| (*name).to_owned()).collect()
        };
        let placed = [LEFT_ABOVE, LEFT_BELOW, RIGHT_ABOVE].concat();
        let others = names.iter().filter(|name| !placed.contains(name)).map(|name| (*name).to_owned()).collect();
        let left = column(&mut tiles, of(LEFT_ABOVE), of(LEFT_BELOW), 0.62);
        let right = column(&mut tiles, of(RIGHT_ABOVE), others, 0.5);
        let root = match (left, right) {
            (Some(left), Some(right)) => {
                let split = Linear::new_binary(LinearDir::Horizontal, [left, right], 0.4);
                tiles.insert_container(Container::Linear(split))
            }
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => return Self { tree: Tree::empty(id()) },
        };
        let mut layout = Self { tree: Tree::new(id(), root, tiles) };
        layout.focus(FIRST);
        layout
    }

    /// What [`Layout::to_json`] wrote; `None` if it is damaged or is about other views than these.
    pub fn from_json(json: &str, names: &[&str]) -> Option<Self> {
        let mut tree: Tree<String> = serde_json::from_str(json).ok()?;
        let mut shown = Vec::new();
        let mut seen = 0;
        walk(&tree.tiles, tree.root()?, 0, &mut seen, &mut shown)?;
        // Every tile was reached once, so there is no circle and nothing that hangs loose.
        let mut wanted = names.to_vec();
        shown.sort_unstable();
        wanted.sort_unstable();
        if seen != tree.tiles.len() || shown != wanted {
            return None;
        }
        tree.tiles.recompute_next_tile_id();
        Some(Self { tree })
    }

    /// The layout as text, to be kept between runs.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.tree).unwrap_or_default()
    }

    /// Whether a view has not been hidden. It may stand behind another tab.
    pub fn is_shown(&self, name: &str) -> bool {
        self.pane(name).is_some_and(|tile| self.tree.is_visible(tile))
    }

    /// Hides a view or shows it where it was.
    pub fn set_shown(&mut self, name: &str, shown: bool) {
        if let Some(tile) = self.pane(name) {
            self.tree.set_visible(tile, shown);
        }
    }

    /// Brings a view to the front.
    pub fn focus(&mut self, name: &str) {
        self.set_shown(name, true);
        self.tree.make_active(|_, tile| matches!(tile, Tile::Pane(pane) if pane == name));
    }

    /// Where a view was drawn last, if it was.
    pub fn place(&self, name: &str) -> Option<egui::Rect> {
        self.tree.tiles.rect(self.pane(name)?)
    }

    fn pane(&self, name: &str) -> Option<TileId> {
        self.tree.tiles.iter().find(|(_, tile)| matches!(tile, Tile::Pane(pane) if pane == name)).map(|(id, _)| *id)
    }
}

fn id() -> egui::Id {
    egui::Id::unique("moewe views")
}

/// Tabs on top of tabs; one of them alone fills the column.
fn column(tiles: &mut Tiles<String>, above: Vec<String>, below: Vec<String>, fraction: f32) -> Option<TileId> {
    let mut tabs = |names: Vec<String>| {
        let panes: Vec<TileId> = names.into_iter().map(|name| tiles.insert_pane(name)).collect();
        (!panes.is_empty()).then(|| tiles.insert_tab_tile(panes))
    };
    match (tabs(above), tabs(below)) {
        (Some(above), Some(below)) => {
            let split = Linear::new_binary(LinearDir::Vertical, [above, below], fraction);
            Some(tiles.insert_container(Container::Linear(split)))
        }
        (one, None) | (None, one) => one,
    }
}

/// Collects the panes below a tile; `None` if something is wrong.
fn walk<'a>(
    tiles: &'a Tiles<String>,
    at: TileId,
    depth: usize,
    seen: &mut usize,
    panes: &mut Vec<&'a str>,
) -> Option<()> {
    *seen += 1;
    if depth > MAX_DEPTH || *seen > tiles.len() {
        return None;
    }
    let children: &[TileId] = match tiles.get(at)? {
        Tile::Pane(name) => {
            panes.push(name);
            return Some(());
        }
        Tile::Container(Container::Tabs(tabs)) => &tabs.children,
        Tile::Container(Container::Linear(linear)) => {
            let sound = |(_, share): (&TileId, &f32)| share.is_finite() && (1e-3..1e3).contains(share);
            linear.shares.iter().all(sound).then_some(&linear.children)?
        }
        Tile::Container(Container::Grid(_)) => return None, // none can be made here
    };
    children.iter().try_for_each(|child| walk(tiles, *child, depth + 1, seen, panes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 5] = ["transcript", "routing", "balance", "time", "change"];

    #[test]
    fn a_layout_comes_back_as_it_was() {
        let mut layout = Layout::standard(&NAMES);
        layout.set_shown("time", false);
        let back = Layout::from_json(&layout.to_json(), &NAMES).expect("sound");
        assert!(!back.is_shown("time") && back.is_shown("routing"));
        assert_eq!(format!("{:?}", back.tree), format!("{:?}", layout.tree));
        let mut back = back;
        back.focus("time");
        assert!(back.is_shown("time"));
    }

    #[test]
    fn every_selection_of_views_has_a_layout() {
        for mask in 0..1 << NAMES.len() {
            let names: Vec<&str> = (0..NAMES.len()).filter(|i| mask >> i & 1 == 1).map(|i| NAMES[i]).collect();
            let layout = Layout::standard(&names);
            assert!(names.iter().all(|name| layout.is_shown(name)), "{names:?}");
            assert_eq!(Layout::from_json(&layout.to_json(), &names).is_some(), !names.is_empty());
        }
    }

    #[test]
    fn damaged_and_foreign_layouts_are_refused() {
        let json = Layout::standard(&NAMES).to_json();
        assert!(Layout::from_json(&json, &NAMES[..4]).is_none(), "a view that there is no more");
        assert!(Layout::from_json(&json, &["transcript", "routing", "balance", "time", "change", "new"]).is_none());
        assert!(Layout::from_json(&json.replace("\"time\"", "\"routing\""), &NAMES).is_none(), "twice the same");
        for end in 0..json.len() {
            assert!(Layout::from_json(&json[..end], &NAMES).is_none());
        }
        let value: serde_json::Value = serde_json::from_str(&json).expect("json");
        let root = value["root"].clone();
        let change = |edit: &dyn Fn(&mut serde_json::Value)| {
            let mut value = value.clone();
            edit(&mut value);
            Layout::from_json(&value.to_string(), &NAMES).is_none()
        };
        assert!(change(&|value| value["root"] = 12345.into()), "no such root");
        assert!(change(&|value| value["root"] = serde_json::Value::Null), "no root");
        let linear = |value: &mut serde_json::Value, edit: &dyn Fn(&mut serde_json::Value)| {
            let tiles = value["tiles"]["tiles"].as_object_mut().expect("tiles");
            tiles.values_mut().filter_map(|tile| tile.pointer_mut("/Container/Linear")).for_each(edit);
        };
        let circle = |linear_tile: &mut serde_json::Value| linear_tile["children"][0] = root.clone();
        assert!(change(&|value| linear(value, &circle)), "a circle");
        let shares = |tile: &mut serde_json::Value| {
            let shares = tile.pointer_mut("/shares/shares").and_then(|shares| shares.as_object_mut()).expect("shares");
            shares.values_mut().for_each(|share| *share = (-1e30).into());
        };
        assert!(change(&|value| linear(value, &shares)), "shares that are none");
    }
}
