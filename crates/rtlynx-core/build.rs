//! Compiles `cuda/` and embeds the device code in the crate (`src/kernels.rs` includes what this writes).
//!
//! | variable | effect |
//! | --- | --- |
//! | `NVCC`, `CUDA_HOME`, `CUDA_PATH` | which nvcc compiles (`build/nvcc.rs` has the whole order) |
//! | `RTLYNX_NO_DEVICE_CODE=1` | build without device code: rtlynx then runs on the CPU only |
//! | `RTLYNX_STRICT=1` | compiler warnings, register spills and stack frames in device code are errors |

#[path = "build/compile.rs"]
mod compile;
#[path = "build/nvcc.rs"]
mod nvcc;

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use compile::Fatbin;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("\n{message}\n");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let folder = |name| env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("cargo did not set {name}"));
    let cuda = folder("CARGO_MANIFEST_DIR")?.join("../../cuda");
    let out = folder("OUT_DIR")?;
    for name in nvcc::ENVIRONMENT.iter().chain(&["RTLYNX_NO_DEVICE_CODE", "RTLYNX_STRICT"]) {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rerun-if-changed={}", cuda.display());

    if switch("RTLYNX_NO_DEVICE_CODE")? {
        return embed(&out, None, &[]);
    }
    let cuda = cuda.canonicalize().map_err(|e| format!("the CUDA sources are not where they belong ({}): {e}", cuda.display()))?;
    let sources = compile::sources(&cuda.join("kernels"))?;
    let nvcc = nvcc::find().map_err(|places| places.to_string())?;
    let fatbins = compile::compile_all(&nvcc, &sources, &cuda.join("include"), &out, switch("RTLYNX_STRICT")?)?;
    embed(&out, Some(&nvcc.version), &fatbins)
}

/// A `0`/`1` environment variable; anything else is a mistake worth an error.
fn switch(name: &str) -> Result<bool, String> {
    match env::var(name).as_deref() {
        Err(_) | Ok("" | "0") => Ok(false),
        Ok("1") => Ok(true),
        Ok(other) => Err(format!("{name} must be 0 or 1, got {other:?}")),
    }
}

/// Writes `device_code.rs`: the nvcc version and one `Image` per fatbin.
fn embed(out: &Path, nvcc: Option<&str>, fatbins: &[Fatbin]) -> Result<(), String> {
    let mut code = format!("const NVCC: Option<&str> = {nvcc:?};\nstatic IMAGES: &[Image] = &[\n");
    for Fatbin { stem, path, targets, kernels } in fatbins {
        let kernels: Vec<&String> = kernels.iter().collect();
        writeln!(
            code,
            "    Image {{ stem: {stem:?}, fatbin: &Aligned(*include_bytes!({path:?})), targets: &{targets:?}, kernels: &{kernels:?} }},"
        )
        .expect("writing to a String cannot fail");
    }
    code.push_str("];\n");
    let file = out.join("device_code.rs");
    fs::write(&file, code).map_err(|e| format!("cannot write {}: {e}", file.display()))
}
