//! `slat adopt vm` and `slat delete leftover`: what lies on a host and is no VM becomes one again,
//! or ends. The leftover is looked up first and what the order gives up is said; an order that
//! gives something up needs `--give-up`.

use serde_json::json;
use slat_proto::{ApiError, Reason, json::to_json, model::HostName, v1};

use super::{get::listing, target::Uid};
use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    term::out,
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat get leftovers                             what there is, and which orders it takes
  slat adopt vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21 --host host-a
  slat adopt vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21 --host host-a --give-up
  slat resume vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21          it is PAUSED then

What an order gives up is said before it is given.";

/// Options of `slat adopt`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AdoptArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl AdoptArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// Make a leftover a VM that can run again
    #[command(after_help = EXAMPLES)]
    Vm(LeftoverTarget),
}

/// One leftover on the command line.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LeftoverTarget {
    /// Its identity, as get leftovers shows it
    #[arg(long, value_name = "UID")]
    uid: Uid,
    /// The host it lies on, as host-a
    #[arg(long, value_name = "HOST")]
    host: HostName,
    /// Accept what the order gives up
    #[arg(long)]
    give_up: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Adopt,
    Delete,
}

impl Order {
    fn word(self) -> &'static str {
        match self {
            Self::Adopt => "adopt",
            Self::Delete => "delete",
        }
    }

    fn gives_up(self, leftover: &v1::Leftover) -> &str {
        match self {
            Self::Adopt => &leftover.adopt_gives_up,
            Self::Delete => &leftover.delete_gives_up,
        }
    }
}

/// Adopts it.
pub(crate) async fn run(args: AdoptArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Vm(target) = args.kind;
    prepare(&session, &target, Order::Adopt).await?;
    let request = v1::AdoptLeftoverRequest {
        host: target.host.to_string(),
        uid: target.uid.to_string(),
        give_up: target.give_up,
        epoch: 0,
    };
    let adopted = session.client.hosts().adopt_leftover(request).await;
    let adopted = adopted.map_err(|status| Failure::call(doing(Order::Adopt, &target), status))?;
    let vm = adopted.into_inner().vm.unwrap_or_default();
    session.answer(
        || to_json(&vm),
        &vm.name,
        || {
            format!(
                "{} {} on {}, epoch {}; it runs with: slat resume vm --uid {}",
                vm.name,
                view::vm_state(vm.state()),
                target.host.id(),
                vm.epoch,
                target.uid
            )
        },
    )
}

/// Deletes it.
pub(super) async fn delete(session: &Session, target: &LeftoverTarget) -> Result<(), Failure> {
    prepare(session, target, Order::Delete).await?;
    let request = v1::DeleteLeftoverRequest {
        host: target.host.to_string(),
        uid: target.uid.to_string(),
        give_up: target.give_up,
    };
    let deleted = session.client.hosts().delete_leftover(request).await;
    deleted.map_err(|status| Failure::call(doing(Order::Delete, target), status))?;
    let name = format!("{}/leftovers/{}", target.host, target.uid);
    session.answer(
        || json!({"host": target.host.to_string(), "uid": target.uid.to_string(), "deleted": true}),
        &name,
        || format!("{name} deleted"),
    )
}

fn doing(order: Order, target: &LeftoverTarget) -> String {
    format!("{} {} on {}", order.word(), target.uid, target.host.id())
}

/// Looks it up, says what it is and what the order gives up, and refuses an order that does not
/// accept that.
async fn prepare(session: &Session, target: &LeftoverTarget, order: Order) -> Result<(), Failure> {
    let doing = doing(order, target);
    let found = listing::leftovers(&session.client, Some(&target.host)).await;
    let found = found.map_err(|status| Failure::call(&doing, status))?.items;
    let uid = target.uid.to_string();
    let leftover = found.iter().find(|one| one.uid == uid);
    out::say(announcement(&doing, leftover, target, order)?);
    Ok(())
}

/// What is said before the order.
fn announcement(
    doing: &str,
    leftover: Option<&v1::Leftover>,
    target: &LeftoverTarget,
    order: Order,
) -> Result<String, Failure> {
    let Some(leftover) = leftover else {
        let message = format!("nothing of that uid lies on {}", target.host);
        let error = ApiError::new(Reason::NoSuchLeftover, message)
            .with("host", &target.host)
            .with("uid", &target.uid);
        return Err(Failure::api(doing, error));
    };
    let words = view::leftover_words(leftover);
    let gives_up = order.gives_up(leftover);
    if !gives_up.is_empty() && !target.give_up {
        let message = format!("{words}. The order gives up: {gives_up}");
        let error = ApiError::new(Reason::GiveUpRequired, message)
            .with("host", &target.host)
            .with("uid", &target.uid)
            .with("gives_up", gives_up);
        return Err(Failure::api(doing, error));
    }
    Ok(match gives_up {
        "" => format!("{words}\nthe order gives up nothing"),
        gives_up => format!("{words}\nthis gives up: {gives_up}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leftover() -> v1::Leftover {
        v1::Leftover {
            host: "hosts/host-a".into(),
            uid: "u-1".into(),
            vm: "vms/web".into(),
            adoptable: true,
            adopt_gives_up: "what ran elsewhere since".into(),
            ..Default::default()
        }
    }

    fn target(give_up: bool) -> LeftoverTarget {
        LeftoverTarget {
            uid: "u-1".parse().unwrap(),
            host: "host-a".parse().unwrap(),
            give_up,
        }
    }

    #[test]
    fn what_an_order_gives_up_is_said_and_must_be_accepted() {
        let one = leftover();
        let failure =
            announcement("adopt u-1", Some(&one), &target(false), Order::Adopt).unwrap_err();
        assert_eq!(failure.exit_code(), 4);
        let text = failure.render();
        assert!(
            text.contains("gives up: what ran elsewhere since"),
            "{text}"
        );
        assert!(text.contains("--give-up"), "{text}");
        let said = announcement("adopt u-1", Some(&one), &target(true), Order::Adopt).unwrap();
        assert!(
            said.ends_with("this gives up: what ran elsewhere since"),
            "{said}"
        );
        let said = announcement("delete u-1", Some(&one), &target(false), Order::Delete).unwrap();
        assert!(said.ends_with("gives up nothing"), "{said}");
        let none = announcement("adopt u-1", None, &target(true), Order::Adopt);
        assert_eq!(none.unwrap_err().exit_code(), 3);
    }
}
