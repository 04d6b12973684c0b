//! Whole configurations: `flexblk_apply`.

use std::path::Path;

use serde_json::json;

use super::super::apply::Plan;
use super::super::params::Params;
use super::{Context, Method, Result, RpcError, change};
use crate::config::Config;

pub(super) const METHODS: &[Method] = &[change("flexblk_apply", apply)];

/// Makes what runs what a TOML file says, all of it or nothing. With `dry_run` it only says what that
/// would be; `epoch`, from such an answer, makes sure that nothing else has changed since.
fn apply(context: &Context, mut params: Params) -> Result {
    let text: String = params.required("toml")?;
    let path: Option<String> = params.optional("path")?;
    let dry_run: bool = params.optional("dry_run")?.unwrap_or(false);
    let epoch: Option<u64> = params.optional("epoch")?;
    params.end()?;
    let path = path.unwrap_or_else(|| "toml".to_owned());
    let wanted = Config::from_toml(&text, Path::new(&path)).map_err(RpcError::params)?;
    let target = &context.target;
    if dry_run {
        let (plan, epoch) = target.look(|draft| {
            let plan = Plan::new(draft, target.config(), &wanted);
            (plan, draft.snapshot.epoch)
        });
        return Ok(json!({
            "changes": plan.lines(), "impossible": plan.impossible, "epoch": epoch,
        }));
    }
    let lines = target.change(|draft| {
        if epoch.is_some_and(|epoch| epoch != draft.snapshot.epoch) {
            let what = "something else has changed the target since; look at the differences again";
            return Err(RpcError::errno(libc::ESTALE, what));
        }
        let plan = Plan::new(draft, target.config(), &wanted);
        if !plan.impossible.is_empty() {
            return Err(RpcError::params(plan.impossible.join("; ")));
        }
        let done = plan.carry_out(draft);
        done.map_err(|error| RpcError::bdev(&error))?;
        Ok(plan.lines())
    })?;
    Ok(json!({ "changes": lines, "impossible": [], "epoch": target.snapshot().epoch }))
}
