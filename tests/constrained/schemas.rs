//! Random JSON schemas, the same for the same seed. Shared by the grammar's tests and those of the engine.

use serde_json::{Map, Value, json};

/// A small random number generator (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    /// A number from 0 to below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// True in `percent` of all cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of several.
    pub fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// How far schemas go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// All that fits them is short: some thirty tokens, a hundred at most.
    Short,
    /// Anything, also lists and strings without end, and recursion.
    Any,
}

const NAMES: [&str; 10] = ["name", "age", "id", "color", "tags", "x", "next", "naïve", "a b", "q\"t"];
const WORDS: [&str; 8] = ["red", "green", "blue", "", "a\nb", "été", "\\", "🦉"];
const PATTERNS: [&str; 6] = ["^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "^(ab|cd)+$", "^x?y", "[A-F]$", "^\\w{1,6}$"];
const SHORT_PATTERNS: [&str; 4] = ["^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "^(ab|cd){1,3}$", "^\\w{1,6}$"];

/// A random schema: an object, a list, or now and then anything else.
pub fn schema(random: &mut Random, reach: Reach) -> Value {
    let mut maker = Maker { random, reach, definitions: Map::new() };
    let depth = if reach == Reach::Short { 2 } else { 3 };
    let mut schema = match maker.random.below(10) {
        0..7 => maker.object(depth),
        7..9 => maker.list(depth),
        _ => maker.value(depth),
    };
    let definitions = maker.definitions;
    if let (false, Value::Object(schema)) = (definitions.is_empty(), &mut schema) {
        schema.insert("$defs".into(), Value::Object(definitions));
    }
    schema
}

/// A definition that is being made, and must not be referred to from within itself: it might not end.
const UNFINISHED: Value = Value::Null;

struct Maker<'a> {
    random: &'a mut Random,
    reach: Reach,
    definitions: Map<String, Value>,
}

impl Maker<'_> {
    fn value(&mut self, depth: usize) -> Value {
        match self.random.below(if depth == 0 { 8 } else { 13 }) {
            0 => json!({"type": "boolean"}),
            1 => json!({"type": "null"}),
            2 => self.integer(),
            3 => self.number(),
            4 | 5 => self.text(),
            6 => self.choice(),
            7 => json!({"type": ["integer", "boolean"], "minimum": -5, "maximum": 5}),
            8 | 9 => self.object(depth - 1),
            10 => self.list(depth - 1),
            11 => {
                let options: Vec<Value> = (0..2 + self.random.below(2)).map(|_| self.value(depth - 1)).collect();
                json!({"anyOf": options})
            }
            _ => self.reference(depth),
        }
    }

    fn integer(&mut self) -> Value {
        let low = self.random.below(2_000) as i64 - 1_000;
        let high = low + self.random.below(500) as i64;
        match self.random.below(6) {
            0 => json!({"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}),
            1 => json!({"type": "integer", "minimum": 0, "maximum": 60, "multipleOf": 5}),
            2 if self.reach == Reach::Any => json!({"type": "integer", "minimum": low}),
            3 if self.reach == Reach::Any => json!({"type": "integer"}),
            _ => json!({"type": "integer", "minimum": low, "maximum": high}),
        }
    }

    fn number(&mut self) -> Value {
        match self.random.below(4) {
            // Fractions have digits without end.
            0 if self.reach == Reach::Any => json!({"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25}),
            1 if self.reach == Reach::Any => json!({"type": "number"}),
            2 => json!({"enum": [0.5, -2, 1e3]}),
            _ => json!({"type": "integer", "minimum": 0, "maximum": 9}),
        }
    }

    fn text(&mut self) -> Value {
        match (self.random.below(5), self.reach) {
            (0, Reach::Any) => json!({"type": "string"}),
            (1, Reach::Any) => json!({"type": "string", "pattern": self.random.of(&PATTERNS)}),
            (1, Reach::Short) => json!({"type": "string", "pattern": self.random.of(&SHORT_PATTERNS)}),
            (2, Reach::Any) => json!({"type": "string", "minLength": self.random.below(4)}),
            (3, _) => json!({"type": "string", "format": self.random.of(&["date", "ipv4", "time", "uuid"])}),
            _ => {
                let least = self.random.below(3);
                json!({"type": "string", "minLength": least, "maxLength": least + self.random.below(8)})
            }
        }
    }

    fn choice(&mut self) -> Value {
        let mut values: Vec<Value> = (0..=self.random.below(3)).map(|_| json!(self.random.of(&WORDS))).collect();
        match self.random.below(6) {
            0 => values.push(json!(self.random.below(100))),
            1 => values.push(Value::Null),
            2 => values.push(json!({"k": [1, true]})),
            3 => return json!({"const": values[0]}),
            _ => {}
        }
        json!({"enum": values})
    }

    fn list(&mut self, depth: usize) -> Value {
        let least = self.random.below(3);
        let most = least + self.random.below(3);
        let items = self.value(depth);
        match self.random.below(6) {
            0 if self.reach == Reach::Any => json!({"type": "array", "items": items, "minItems": least}),
            1 => {
                json!({"type": "array", "prefixItems": [self.value(0), items], "items": false, "minItems": least.min(2)})
            }
            _ => json!({"type": "array", "items": items, "minItems": least, "maxItems": most}),
        }
    }

    fn object(&mut self, depth: usize) -> Value {
        let count = 1 + self.random.below(if self.reach == Reach::Short { 3 } else { 5 });
        let mut properties = Map::new();
        while properties.len() < count {
            let name = (*self.random.of(&NAMES)).to_owned();
            let value = self.value(depth);
            properties.entry(name).or_insert(value);
        }
        let required: Vec<&String> = properties.keys().filter(|_| self.random.chance(60)).collect();
        let mut object = json!({"type": "object", "required": required});
        object["properties"] = Value::Object(properties);
        match self.random.below(8) {
            0 if self.reach == Reach::Any => object["additionalProperties"] = json!({"type": "integer"}),
            1 if self.reach == Reach::Any => object["additionalProperties"] = json!(true),
            2..6 => object["additionalProperties"] = json!(false),
            // The grammar leaves other properties out, too.
            _ => {}
        }
        object
    }

    fn reference(&mut self, depth: usize) -> Value {
        let name = format!("d{}", self.random.below(3));
        if self.definitions.get(&name) == Some(&UNFINISHED) {
            return json!({"type": "boolean"});
        }
        if !self.definitions.contains_key(&name) {
            self.definitions.insert(name.clone(), UNFINISHED);
            let mut definition = self.value(depth - 1);
            if self.reach == Reach::Any && self.random.chance(30) {
                let own = json!({"anyOf": [{"type": "null"}, {"$ref": format!("#/$defs/{name}")}]});
                definition = json!({"type": "object", "properties": {"next": own}, "required": ["next"]});
            }
            self.definitions.insert(name.clone(), definition);
        }
        json!({"$ref": format!("#/$defs/{name}")})
    }
}
