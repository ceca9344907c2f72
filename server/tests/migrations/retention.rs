//! Ended migrations are forgotten beyond a number; one with work left is not, and pages go on.

use slat_proto::v1::{
    self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role,
};
use slat_server::Retention;

use super::{
    Fleet, VM,
    support::{Clients, server_that_keeps, until},
};

async fn names(clients: &mut Clients, page_size: i32, page_token: &str) -> (Vec<String>, String) {
    let request = v1::ListMigrationsRequest {
        page_size,
        page_token: page_token.into(),
        ..Default::default()
    };
    let page = clients.migrations.list_migrations(request).await.unwrap();
    let page = page.into_inner();
    let names = page.migrations.into_iter().map(|migration| migration.name);
    (names.collect(), page.next_page_token)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_forgets_the_oldest_and_its_pages_go_on() {
    let mut fleet = Fleet::start().await;
    // The oldest has work left: its destination's side is not released.
    fleet.b.fake.keep_sides(true);
    let oldest = fleet.precopy().await;
    fleet.clients.cancel(&oldest).await.unwrap();
    fleet.clients.wait_phase(&oldest, Phase::Cancelled).await;
    let mut made = Vec::new();
    for _ in 0..5 {
        // Cancelled while it waits for that side: nobody was asked for anything.
        let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
        fleet.clients.cancel(&name).await.unwrap();
        fleet.clients.wait_phase(&name, Phase::Cancelled).await;
        made.push(name);
    }
    let (first, token) = names(&mut fleet.clients, 2, "").await;
    assert_eq!(first, [made[4].clone(), made[3].clone()]);

    fleet.server.stop().await;
    let retention = Retention {
        keep: 1,
        ..Retention::default()
    };
    fleet.server = server_that_keeps(fleet.state.path(), retention).await;
    fleet.clients = Clients::new(fleet.server.address());
    until("the others are forgotten", async || {
        let mut clients = Clients::new(fleet.server.address());
        names(&mut clients, 10, "").await.0 == [made[4].clone(), oldest.clone()]
    })
    .await;
    // The last of the first page is gone; the list goes on behind it.
    let rest = names(&mut fleet.clients, 2, &token).await;
    assert_eq!(rest, (vec![oldest.clone()], String::new()));
    let bad = v1::ListMigrationsRequest {
        page_token: oldest.clone(),
        ..Default::default()
    };
    let refused = fleet.clients.migrations.list_migrations(bad).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::InvalidArgument);

    // A server that runs does it when one ends.
    fleet.report_again().await;
    fleet.b.fake.keep_sides(false);
    until("the oldest is forgotten too", async || {
        let mut clients = Clients::new(fleet.server.address());
        names(&mut clients, 10, "").await.0 == [made[4].clone()]
    })
    .await;
    let name = fleet.precopy().await;
    fleet.a.fake.phase(&name, Role::Source, SidePhase::Failed);
    fleet.clients.wait_phase(&name, Phase::Failed).await;
    until(
        "the last one takes the place of the one before",
        async || {
            let mut clients = Clients::new(fleet.server.address());
            names(&mut clients, 10, "").await.0 == [name.clone()]
        },
    )
    .await;
    fleet.stop().await;
}
