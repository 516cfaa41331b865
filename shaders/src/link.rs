//! From a variant to validated WGSL. This is the only file that knows the linker (crate `wesl`) and the validator.

use std::collections::HashMap;
use std::fmt::Write as _;

use moewe_plan::{Access, BindingLayout};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use wesl::syntax::{
    Attribute, Expression, ExpressionNode, GlobalDeclaration, LiteralExpression, ModulePath, PathOrigin,
    TranslationUnit,
};
use wesl::{CompileOptions, Feature, Features, Mangler, VirtualResolver};

use crate::skeleton::{BLOCK_NARROW, BLOCK_WIDE, MODULE_FLAGS, SHARED, skeleton};
use crate::variant::{Const, Reduce, Variant};

/// A linked and validated kernel.
#[derive(Clone, Debug)]
pub struct Linked {
    /// WGSL text, with the skeleton's header and the variant's constants as comments.
    pub wgsl: String,
    /// Bindings, numbered from 0 without gaps.
    pub bindings: Vec<BindingLayout>,
    /// Invocations of a workgroup.
    pub workgroup_size: [u32; 3],
    /// Workgroup memory in bytes.
    pub workgroup_bytes: u32,
    /// Whether subgroup operations are used.
    pub subgroups: bool,
    /// Rows and columns of the cooperative matrices that are used; 0 if none are.
    pub cooperative: u32,
}

/// Why a variant could not be linked. Each is a bug of ours or a misuse of the library, never of a model.
#[derive(Debug, thiserror::Error)]
#[error("kernel variant {variant}: {what}")]
pub struct Error {
    /// Name of the variant.
    pub variant: String,
    /// What is wrong.
    pub what: String,
}

/// Links a variant and validates it.
pub fn link(variant: &Variant) -> Result<Linked, Error> {
    let fail = |what: String| Error { variant: variant.name(), what };
    let skeleton = skeleton(variant.kernel).ok_or_else(|| fail("no such kernel".into()))?;
    let sockets = [
        ("weight", skeleton.weight || skeleton.matrix, variant.weight.is_some()),
        ("latent", skeleton.latent, variant.latent.is_some()),
        ("reduce", skeleton.reduce, variant.reduce.is_some()),
    ];
    if let Some((socket, wanted, _)) = sockets.iter().find(|(_, wanted, given)| wanted != given) {
        return Err(fail(format!("socket {socket}: {}", if *wanted { "nothing plugged in" } else { "there is none" })));
    }
    if let Some(flag) = variant.flags.iter().find(|flag| !skeleton.flags.contains(flag)) {
        return Err(fail(format!("no flag {flag}")));
    }

    let mut resolver = VirtualResolver::new();
    let mut add = |name: &str, source: String| resolver.add_module(module(name), source.into());
    add(skeleton.name, skeleton.source.to_owned());
    for (name, source) in SHARED {
        add(name, (*source).to_owned());
    }
    add("tune", tune(variant));
    variant.weight_source().into_iter().for_each(|source| add("weight", source.to_owned()));
    if skeleton.matrix {
        add("block", if variant.wide { BLOCK_WIDE } else { BLOCK_NARROW }.to_owned());
        variant.matrix_source().into_iter().for_each(|source| add("matrix", source.to_owned()));
    }
    variant.latent_source().into_iter().for_each(|source| add("latent", source.to_owned()));
    variant.reduce.into_iter().for_each(|reduce| add("reduce", reduce.source().to_owned()));

    // Modules that a skeleton imports may ask for flags that it does not have: those are off.
    let flags = skeleton.flags.iter().chain(MODULE_FLAGS);
    let flags = flags.map(|flag| ((*flag).to_owned(), Feature::from(variant.flags.contains(flag))));
    let options = CompileOptions {
        validate: false, // naga is the validator
        features: Features { default: Feature::Error, flags: flags.collect::<HashMap<_, _>>() },
        ..CompileOptions::default()
    };
    let compiled = wesl::compile(&module(skeleton.name), &resolver, &Readable, &options)
        .map_err(|error| fail(error.to_string()))?;
    let mut syntax = compiled.syntax;
    renumber(&mut syntax).map_err(fail)?;
    let cooperative = match (skeleton.cooperative, variant.flags.contains("sixteen")) {
        (false, _) => 0,
        (true, false) => 8,
        (true, true) => 16,
    };
    let enable = if cooperative > 0 { "enable f16;\nenable wgpu_cooperative_matrix;\n" } else { "" };
    let wgsl = format!("{}\n{enable}{syntax}\n", header(skeleton.source, variant));
    let subgroups = variant.reduce == Some(Reduce::Subgroup)
        || cooperative > 0
        || ["pooled", "subgroup"].iter().any(|flag| variant.flags.contains(flag));
    reflect(wgsl, subgroups, cooperative).map_err(fail)
}

fn module(name: &str) -> ModulePath {
    ModulePath::new(PathOrigin::Absolute, vec![name.to_owned()])
}

/// Names of imported things in the linked text: constants of `tune`, and those of modules with bindings, as they are, others
/// as `module_name`.
#[derive(Debug)]
struct Readable;

impl Mangler for Readable {
    fn mangle(&self, path: &ModulePath, item: &str) -> String {
        match path.components.last().map(String::as_str) {
            None | Some("tune" | "latent_row" | "positions" | "query" | "routing") => item.to_owned(),
            Some(module) => format!("{module}_{item}"),
        }
    }
}

/// The module of constants.
fn tune(variant: &Variant) -> String {
    variant.consts.iter().fold(String::new(), |mut text, (name, value)| {
        let line = match value {
            Const::U32(value) => writeln!(text, "const {name}: u32 = {value}u;"),
            Const::F32(value) => writeln!(text, "const {name}: f32 = {value:?}f;"),
        };
        line.expect("writing to a string does not fail");
        text
    })
}

/// The comment lines at the head of a skeleton, and what this variant makes of them.
fn header(source: &str, variant: &Variant) -> String {
    let mut lines: Vec<String> = source.lines().take_while(|line| line.starts_with("//")).map(str::to_owned).collect();
    lines.push(format!("//\n// variant {}", variant.name()));
    let flags: Vec<&str> = variant.flags.iter().copied().collect();
    lines.push(format!("// flags: {}", if flags.is_empty() { "none".into() } else { flags.join(", ") }));
    lines.join("\n")
}

/// Numbers the bindings that are left from 0 without gaps, in the skeleton's order.
fn renumber(syntax: &mut TranslationUnit) -> Result<(), String> {
    let mut found = Vec::new();
    for declaration in &mut syntax.global_declarations {
        if let GlobalDeclaration::Declaration(declaration) = &mut **declaration {
            for attribute in &mut declaration.attributes {
                if let Attribute::Binding(number) = &mut **attribute {
                    let Expression::Literal(LiteralExpression::AbstractInt(value)) = **number else {
                        return Err(format!("binding number {number} is not a plain integer"));
                    };
                    found.push((value, number));
                }
            }
        }
    }
    found.sort_by_key(|(value, _)| *value);
    for (new, (_, number)) in found.into_iter().enumerate() {
        *number = ExpressionNode::from(Expression::Literal(LiteralExpression::AbstractInt(new as i64)));
    }
    Ok(())
}

/// Validates the text and reads bindings and sizes off it.
fn reflect(wgsl: String, subgroups: bool, cooperative: u32) -> Result<Linked, String> {
    let module = naga::front::wgsl::parse_str(&wgsl).map_err(|error| error.emit_to_string(&wgsl))?;
    // unpack2x16float and pack2x16float belong to core WebGPU.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SUBGROUP, subgroups);
    capabilities.set(Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX, cooperative > 0);
    Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .map_err(|error| error.emit_to_string(&wgsl))?;
    let [entry] = module.entry_points.as_slice() else {
        return Err(format!("{} entry points, one expected", module.entry_points.len()));
    };
    let mut bindings = Vec::new();
    let mut workgroup_bytes = 0;
    for (_, variable) in module.global_variables.iter() {
        let access = match variable.space {
            naga::AddressSpace::Uniform => Access::Uniform,
            naga::AddressSpace::Storage { access } if access.contains(naga::StorageAccess::STORE) => Access::ReadWrite,
            naga::AddressSpace::Storage { .. } => Access::Read,
            naga::AddressSpace::WorkGroup => {
                workgroup_bytes += module.types[variable.ty].inner.size(module.to_ctx());
                continue;
            }
            _ => continue,
        };
        let binding = variable.binding.as_ref().ok_or("a resource without binding")?;
        let name = variable.name.clone().unwrap_or_default();
        bindings.push((binding.binding, BindingLayout { name, access }));
    }
    bindings.sort_by_key(|(number, _)| *number);
    let workgroup_size = entry.workgroup_size;
    let bindings = bindings.into_iter().map(|(_, layout)| layout).collect();
    Ok(Linked { wgsl, bindings, workgroup_size, workgroup_bytes, subgroups, cooperative })
}
