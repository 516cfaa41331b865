//! What is refused, and how it is said: bundles that are damaged, plans that the device cannot run, memory that is not there.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{continuation, gpu, load, options, plan, write_bundle};
use moewe_plan::{
    Buffer, Bundle, DType, Dim, FORMAT_VERSION, Kernel, Plan, Precision, ProgramKind, Role, Segment, Symbol,
    WeightFile, hash_file,
};
use moewe_runtime::{
    Error, GenerateOptions, Gpu, LoadOptions, Model, Progress, Result, Selector, Session, SessionOptions, generate,
};

fn bundle() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    write_bundle(&path, plan());
    (dir, path)
}

fn open_and_load(path: &Path) -> Result<()> {
    Model::load(&gpu(), &Bundle::open(path)?, &|_| ()).map(|_| ())
}

/// Loading, preparing and allocating; the error is expected.
fn refused(plan: Plan) -> Error {
    match load(plan).and_then(|model| Session::new(model, options(1))) {
        Ok(_) => panic!("it was accepted"),
        Err(error) => error,
    }
}

fn scratch(name: &str, elements: Dim) -> Buffer {
    Buffer { name: name.into(), dtype: DType::F32, elements, role: Role::Scratch }
}

/// Binds further buffers to nothing but taps, so that they are allocated.
fn with_buffers(mut plan: Plan, buffers: Vec<Buffer>) -> Plan {
    for buffer in buffers {
        let index = plan.buffers.len() as u32;
        plan.buffers.push(buffer);
        let tap = moewe_plan::TapSpec {
            name: format!("extra {index}"),
            group: moewe_plan::TapGroup::Hidden,
            layer: None,
            buffer: index,
            rows: Dim::Const(0),
            stride: 1,
            offset: 0,
            columns: 1,
        };
        plan.programs[2].taps.push(tap);
    }
    plan
}

#[test]
fn damaged_bundles_are_refused() {
    let damage = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let (_dir, path) = bundle();
        let mut bytes = fs::read(path.join(name)).unwrap();
        change(&mut bytes);
        fs::write(path.join(name), bytes).unwrap();
        open_and_load(&path).expect_err(name).to_string()
    };
    for name in ["plan.json", "manifest.json", "kernels/score.wgsl", "weights-0.safetensors", "weights-1.safetensors"] {
        let flipped = damage(name, &|bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        });
        let short = damage(name, &|bytes| bytes.truncate(bytes.len() - 1));
        for error in [flipped, short] {
            assert!(error.contains(name) || error.contains("bundle format"), "{name}: {error}");
        }
        let (_dir, path) = bundle();
        fs::remove_file(path.join(name)).unwrap();
        let error = open_and_load(&path).expect_err(name).to_string();
        assert!(error.contains(name), "{name}: {error}");
    }
    let error = damage("manifest.json", &|bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        let version = format!("\"format_version\": {FORMAT_VERSION}");
        *bytes = text.replace(&version, "\"format_version\": 77").into_bytes();
    });
    assert!(error.contains(&format!("bundle format 77, this moewe reads format {FORMAT_VERSION}")), "{error}");
    let error = open_and_load(Path::new("/no/such/bundle")).unwrap_err().to_string();
    assert!(error.contains("/no/such/bundle") && error.contains("moewe compile"), "{error}");
}

#[test]
fn a_plan_without_weights_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    write_bundle(&path, plan());
    let mut bundle = Bundle::open(&path).unwrap();
    bundle.plan.weights[0].shards[0].segments.clear();
    let error = Model::load(&gpu(), &bundle, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("has no weights"), "{error}");
}

#[test]
fn missing_limits_are_named_with_a_remedy() {
    let mut greedy = plan();
    greedy.requirements.storage_buffers = 1_000_000_000;
    let error = refused(greedy);
    assert!(
        matches!(error, Error::Requirement { what: "storage buffers for a kernel", required: 1_000_000_000, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("--target"), "{error}");
    let mut greedy = plan();
    greedy.requirements.workgroup_bytes = u32::MAX;
    assert!(matches!(refused(greedy), Error::Requirement { what: "bytes of workgroup memory", .. }));
    let mut greedy = plan();
    greedy.requirements.workgroup_invocations = 1 << 20;
    assert!(matches!(refused(greedy), Error::Requirement { what: "invocations in a workgroup", .. }));
}

#[test]
fn absurd_buffers_give_an_error_not_a_crash() {
    let error = refused(with_buffers(plan(), vec![scratch("huge", Dim::Const(1 << 47))]));
    assert!(matches!(&error, Error::BufferTooLarge { name, .. } if name == "huge"), "{error}");
    let wide = Dim::Times(Symbol::Tokens, 1 << 44);
    let error = refused(with_buffers(plan(), vec![scratch("wide", wide)]));
    assert!(matches!(&error, Error::BufferTooLarge { name, .. } if name == "wide"), "{error}");
    // Each is possible, all together are not.
    let many = (0..4000).map(|i| scratch(&format!("part {i}"), Dim::Const(1 << 24))).collect();
    let error = refused(with_buffers(plan(), many));
    assert!(matches!(error, Error::OutOfMemory { bytes: 67_108_864, .. }), "{error}");
}

#[test]
fn a_kernel_that_is_none_is_named() {
    let mut odd = plan();
    odd.kernels.push(Kernel { name: "odd".into(), file: "kernels/odd.wgsl".into(), ..odd.kernels[3].clone() });
    odd.programs[0].steps[3].kernel = odd.kernels.len() as u32 - 1;
    let error = refused(odd);
    assert!(matches!(&error, Error::Kernel { kernel, .. } if kernel == "odd"), "{error}");
    // Bindings that the source does not have are as wrong as a source that does not parse.
    let mut odd = plan();
    odd.kernels[3].bindings[0].access = moewe_plan::Access::Read;
    assert!(matches!(refused(odd), Error::Kernel { kernel, .. } if kernel == "advance"));
}

#[test]
fn plans_that_contradict_themselves_are_refused() {
    let mut twice = plan();
    twice.buffers.push(Buffer { name: "tokens too".into(), ..twice.buffers[1].clone() });
    assert!(refused(twice).to_string().contains("buffers tokens, tokens too share the role Tokens"));
    let mut small = plan();
    small.buffers[6].elements = Dim::Times(Symbol::Rows, 2);
    assert!(refused(small).to_string().contains("buffer finished has"));
    // One buffer read and written by one dispatch is refused by the device when the batch runs.
    let mut exclusive = plan();
    let own = exclusive.programs[2].steps[2].bindings[2];
    exclusive.programs[2].steps[2].bindings[1] = own;
    let mut session = Session::new(load(exclusive).unwrap(), options(1)).unwrap();
    let sequence = session.add_sequence(&[1], moewe_plan::Sampling::default()).unwrap();
    let batch = moewe_runtime::Batch::of(sequence, &[1], 0);
    let error = session.run(ProgramKind::Trace, &batch).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    // The session is not spoilt by it.
    assert!(session.prefill(&[sequence], None).is_ok());
    let mut flat = plan();
    flat.programs[2].steps[0].grid[1] = Dim::Const(70_000);
    let mut session = Session::new(load(flat).unwrap(), options(1)).unwrap();
    let sequence = session.add_sequence(&[1], moewe_plan::Sampling::default()).unwrap();
    let error = session.run(ProgramKind::Trace, &moewe_runtime::Batch::of(sequence, &[1], 0)).unwrap_err();
    assert!(matches!(error, Error::GridTooLarge { found: 70_000, .. }), "{error}");
}

#[test]
fn parameters_and_taps_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    write_bundle(&path, plan());
    // The bundle's own check comes first, so the plan is changed behind it.
    let refused = |change: &dyn Fn(&mut Plan)| {
        let mut bundle = Bundle::open(&path).unwrap();
        change(&mut bundle.plan);
        match Model::load(&gpu(), &bundle, &|_| ()) {
            Err(Error::Plan { what }) => what,
            found => panic!("{found:?}"),
        }
    };
    let index = |name: &str| plan().buffers.iter().position(|buffer| buffer.name == name).unwrap();
    let (offset, scale) = (index("offset"), index("scale"));
    let what = refused(&|plan| plan.parameters[0].buffer = 1000);
    assert!(what.contains("parameter ExpertOffset of layer 0 is in buffer 1000 of"), "{what}");
    let what = refused(&|plan| plan.buffers[offset].elements = Dim::Symbol(Symbol::Pages));
    assert!(what.contains("offset has pages elements, not a constant"), "{what}");
    let what = refused(&|plan| plan.parameters[1].len = 3);
    assert!(what.contains("buffer scale holds 2 F32 as Parameter, 3 F32 as Parameter expected"), "{what}");
    let what = refused(&|plan| plan.buffers[scale].dtype = DType::U32);
    assert!(what.contains("holds 2 U32"), "{what}");
    let what = refused(&|plan| plan.buffers[scale].role = Role::State);
    assert!(what.contains("as State"), "{what}");
    let what = refused(&|plan| plan.parameters[1] = moewe_plan::Parameter { len: 2, ..plan.parameters[0].clone() });
    assert!(what.contains("buffer offset is another parameter's, too"), "{what}");
    let what = refused(&|plan| plan.parameters.truncate(1));
    assert!(what.contains("buffer scale has the role Parameter, no parameter is in it"), "{what}");
    let what = refused(&|plan| plan.programs[3].steps[4].only_for.push(9));
    assert!(what.contains("step mix is only for tap 9 of 6"), "{what}");
    let what = refused(&|plan| plan.programs[3].taps[0].rows = Dim::Symbol(Symbol::Rows));
    assert!(what.contains("tap copy of the watch program has rows rows, one for each token expected"), "{what}");
    // A tap of wanted rows is no more than another form of one of tokens.
    let what = refused(&|plan| plan.programs[3].taps[5].columns = 1);
    assert!(what.contains("tap told of the watch program has rows rows"), "{what}");
    let what = refused(&|plan| plan.programs[3].taps[4].rows = Dim::Symbol(Symbol::Rows));
    assert!(what.contains("tap told of the watch program has rows rows"), "{what}");
    let what = refused(&|plan| plan.programs[3].taps[5].rows = Dim::Times(Symbol::Rows, 1));
    assert!(what.contains("tap told of the watch program has rows"), "{what}");
    let what = refused(&|plan| plan.programs[5].taps[0].rows = Dim::Const(1));
    assert!(what.contains("tap mtp.1.ids of the draft 1 program has 1 rows"), "{what}");
}

#[test]
fn programs_that_are_not_there_are_named() {
    let model = load(plan()).unwrap();
    let draft = SessionOptions { kinds: vec![ProgramKind::Draft { module: 2 }], ..SessionOptions::default() };
    assert!(matches!(Session::new(model.clone(), draft), Err(Error::NoProgram { .. })));
    let fast = SessionOptions { precision: Precision::Fast, ..SessionOptions::default() };
    let error = Session::new(model, fast).unwrap_err();
    assert_eq!(error.to_string(), "the bundle has no forward program for precision fast");
    let (_dir, path) = bundle();
    let model = Model::load_for(&gpu(), &Bundle::open(&path).unwrap(), &[ProgramKind::Forward], &|_| ()).unwrap();
    assert!(Session::new(model.clone(), SessionOptions::default()).is_ok());
    assert!(matches!(Session::new(model, options(1)), Err(Error::NotPrepared { place: "model", .. })));
}

#[test]
fn loading_reports_its_progress_and_frees_its_memory() {
    let (_dir, path) = bundle();
    let gpu = gpu();
    let seen = std::cell::RefCell::new(Vec::new());
    let model = Model::load(&gpu, &Bundle::open(&path).unwrap(), &|p| seen.borrow_mut().push(p)).unwrap();
    model.prepare(&[ProgramKind::Forward], Precision::Exact, &|p| seen.borrow_mut().push(p)).unwrap();
    let seen = seen.into_inner();
    assert!(seen.contains(&Progress::Verify { done: 80, total: 80 }), "{seen:?}");
    assert!(seen.contains(&Progress::Upload { done: 64, total: 64 }), "{seen:?}");
    assert!(seen.contains(&Progress::Pipelines { done: 4, total: 4 }), "{seen:?}");
    let weights = gpu.held_bytes();
    let session = Session::new(model.clone(), options(1)).unwrap();
    assert!(gpu.held_bytes() > weights);
    drop(session);
    assert_eq!(gpu.held_bytes(), weights);
    drop(model);
    assert_eq!(gpu.held_bytes(), 0);
}

/// Bytes of a weight file that is longer than what stages may be apart.
const LONG: usize = 300 << 20;

/// The bundle with a long file more, whose end the first shard needs before its begin.
fn long_bundle(path: &Path) -> Bundle {
    let mut bundle = Bundle::open(path).unwrap();
    let mut bytes = vec![0; LONG];
    bytes.iter_mut().step_by(4099).zip(0u32..).for_each(|(byte, i)| *byte = (i % 251) as u8);
    let file = bundle.plan.files.len() as u32;
    let (path, blake3) = ("weights-long.safetensors".into(), hash_file(&bytes));
    fs::write(bundle.dir.join(&path), &bytes).unwrap();
    bundle.plan.files.push(WeightFile { path, referenced: false, bytes: LONG as u64, blake3 });
    let segments = &mut bundle.plan.weights[0].shards[0].segments;
    segments.push(Segment { file, offset: LONG as u64 - 5001, bytes: 5000 });
    segments.push(Segment { file, offset: 17, bytes: 9 << 20 });
    bundle
}

#[test]
fn weights_arrive_from_files_that_are_read_out_of_order() {
    let (_dir, path) = bundle();
    let bundle = long_bundle(&path);
    let seen = std::cell::RefCell::new(Vec::new());
    let load =
        LoadOptions { kinds: &[ProgramKind::Forward], prepare: &[ProgramKind::Forward], precision: Precision::Exact };
    let model = Model::load_with(&gpu(), &bundle, load, &|p| seen.borrow_mut().push(p)).unwrap();
    let (loaded, files) = (model.loaded(), 80 + LONG as u64);
    assert_eq!(loaded.file_bytes, files);
    assert!(loaded.copied_bytes > 9 << 20 && loaded.copied_bytes < 10 << 20, "{loaded:?}");
    for seconds in [loaded.read_seconds, loaded.verify_seconds, loaded.copy_seconds] {
        assert!(seconds > 0.0 && seconds <= loaded.seconds, "{loaded:?}");
    }
    let seen = seen.into_inner();
    assert!(seen.contains(&Progress::Verify { done: files, total: files }), "{seen:?}");
    assert!(seen.contains(&Progress::Pipelines { done: 4, total: 4 }), "{seen:?}");
    // What the kernels look up is still in its place.
    let mut session = Session::new(model, SessionOptions::default()).unwrap();
    let options = GenerateOptions { max_new_tokens: 8, ..GenerateOptions::default() };
    let generated = generate(&mut session, &[1, 2, 3], &options, |_| std::ops::ControlFlow::Continue(())).unwrap();
    assert_eq!(generated.tokens, continuation(&[1, 2, 3], 8, false));
}

#[test]
fn weights_that_turn_out_damaged_after_they_were_copied_are_thrown_away() {
    let (_dir, path) = bundle();
    let bundle = long_bundle(&path);
    let file = bundle.dir.join("weights-long.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    bytes[LONG - 1] ^= 0x10; // no segment has it
    fs::write(&file, bytes).unwrap();
    let gpu = gpu();
    let copied = std::cell::Cell::new(false);
    let progress = |progress| {
        if let Progress::Upload { done, total } = progress {
            copied.set(done == total);
        }
    };
    let error = Model::load_for(&gpu, &bundle, &[ProgramKind::Forward], &progress).unwrap_err();
    assert!(matches!(error, Error::Bundle(moewe_plan::Error::Damaged { .. })), "{error}");
    assert!(error.to_string().contains("weights-long.safetensors"), "{error}");
    assert_eq!(gpu.held_bytes(), 0, "all copied: {}", copied.get());
}

#[test]
fn loading_can_be_stopped() {
    static STOP: AtomicBool = AtomicBool::new(false);
    let (_dir, path) = bundle();
    let bundle = long_bundle(&path);
    let gpu = gpu();
    gpu.stop_when(&STOP);
    let progress = |progress| {
        if let Progress::Verify { done, total } = progress {
            assert!(done < total, "it went on to the end");
            STOP.store(true, Ordering::Relaxed);
        }
    };
    let load =
        LoadOptions { kinds: &[ProgramKind::Forward], prepare: &[ProgramKind::Forward], precision: Precision::Exact };
    let error = Model::load_with(&gpu, &bundle, load, &progress).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
    assert_eq!(gpu.held_bytes(), 0);
    STOP.store(false, Ordering::Relaxed);
    assert!(Model::load_for(&gpu, &bundle, &[ProgramKind::Forward], &|_| ()).is_ok());
}

/// Loads a bundle, its pipelines with a cache in `dir`.
fn load_cached(path: &Path, dir: &Path) {
    let gpu = gpu();
    gpu.cache_pipelines_in(dir);
    let kinds = [ProgramKind::Forward];
    let load = LoadOptions { kinds: &kinds, prepare: &kinds, precision: Precision::Exact };
    let model = Model::load_with(&gpu, &Bundle::open(path).unwrap(), load, &|_| ()).unwrap();
    let mut session = Session::new(model, SessionOptions::default()).unwrap();
    let options = GenerateOptions { max_new_tokens: 4, ..GenerateOptions::default() };
    let generated = generate(&mut session, &[3, 1], &options, |_| std::ops::ControlFlow::Continue(())).unwrap();
    assert_eq!(generated.tokens, continuation(&[3, 1], 4, false));
}

#[test]
fn the_drivers_cache_is_kept_and_made_anew_if_it_is_damaged() {
    let (dir, path) = bundle();
    let caches = dir.path().join("not/there/yet");
    load_cached(&path, &caches);
    let files = || fs::read_dir(&caches).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let [file] = &files()[..] else { panic!("one file expected: {:?}", files()) };
    let sound = fs::read(file).unwrap();
    assert_eq!(&sound[..8], b"moewePC1");
    // Nothing new: it is left as it is.
    let written = || file.metadata().unwrap().modified().unwrap();
    let first = written();
    load_cached(&path, &caches);
    assert_eq!(written(), first);
    let flipped = |at: usize| {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        bytes
    };
    let middle = sound.len() / 2;
    for damaged in [vec![], sound[..middle].to_vec(), flipped(3), flipped(20), flipped(sound.len() - 1)] {
        fs::write(file, &damaged).unwrap();
        load_cached(&path, &caches);
        assert_eq!(fs::read(file).unwrap()[..8], sound[..8]);
        assert_ne!(fs::read(file).unwrap(), damaged, "it is written anew");
        assert_eq!(files().len(), 1, "nothing else stays behind");
    }
}

#[test]
fn a_cache_that_cannot_be_written_does_no_harm() {
    let (dir, path) = bundle();
    // A file where the directory should be, and a directory where the file should be: nobody, whatever their rights, can
    // write there.
    let blocked = dir.path().join("blocked");
    fs::write(&blocked, b"a file").unwrap();
    load_cached(&path, &blocked);
    assert_eq!(fs::read(&blocked).unwrap(), b"a file");
    let caches = dir.path().join("caches");
    load_cached(&path, &caches);
    let file = fs::read_dir(&caches).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(&file).unwrap();
    fs::create_dir_all(file.join("in the way")).unwrap();
    load_cached(&path, &caches);
    assert_eq!(fs::read_dir(&caches).unwrap().count(), 1, "what could not be moved into place is removed");
}

#[test]
fn devices_are_chosen_by_index_and_name() {
    let devices = moewe_runtime::list();
    assert!(!devices.is_empty(), "this test needs a Vulkan device");
    let first = &devices[0];
    assert_eq!(Gpu::open(&Selector::Index(0)).unwrap().info().name, first.name);
    let part = first.name.to_uppercase();
    assert!(Gpu::open(&Selector::Name(part)).is_ok());
    for selector in [Selector::Index(99), Selector::Name("no such device".into())] {
        let error = Gpu::open(&selector).unwrap_err();
        assert!(matches!(error, Error::NoSuchDevice { .. }), "{error}");
        assert!(error.to_string().contains(&first.name), "{error}");
    }
    assert_eq!("1".parse(), Ok(Selector::Index(1)));
    assert_eq!("".parse(), Ok(Selector::Default));
    assert_eq!("llvmpipe".parse(), Ok(Selector::Name("llvmpipe".into())));
}

#[test]
fn the_device_can_be_measured() {
    let gpu = gpu().with_cooperative().unwrap();
    let bandwidth = moewe_runtime::copy_bandwidth(&gpu).unwrap();
    let dispatch = moewe_runtime::dispatch_cost(&gpu).unwrap();
    let submit = moewe_runtime::submit_latency(&gpu).unwrap();
    let started = std::time::Instant::now();
    let rates = moewe_runtime::matrix_rates(&gpu).unwrap();
    println!("{bandwidth:?}, {dispatch} µs a dispatch, {submit} µs a submission, {rates:?}, {:?}", started.elapsed());
    assert!(bandwidth.kernel > 0.0 && bandwidth.copy > 0.0 && submit > 0.0);
    // No device multiplies slower than one number after another, or faster than all that were ever built.
    for rate in [Some(rates.f32), rates.f16, rates.cooperative].into_iter().flatten() {
        assert!((1e8..1e16).contains(&rate) && rate <= rates.best(), "{rates:?}");
    }
    assert_eq!(rates.f16.is_some(), gpu.info().shader_f16);
    assert_eq!(rates.cooperative.is_some(), !gpu.info().cooperative.is_empty());
}
