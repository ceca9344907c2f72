//! The fleet as last seen, in redb.
//!
//! Tables: `fleet_hosts` (name → record), `fleet_vms` (host, uid → record) and `fleet_epochs`
//! (uid → epoch). What changed together is written in one transaction. `hosts` (name → address) is
//! older; it still answers for a host that has no record here.

use prost::Message;
use redb::{ReadableDatabase as _, ReadableTable as _, TableDefinition};
use slat_proto::v1;

use super::{
    error::StoreError,
    redb::{HOSTS, RedbStore, failed},
    seen::{FleetStore, SeenChanges, SeenFleet},
};

const FLEET_HOSTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("fleet_hosts");
const FLEET_VMS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("fleet_vms");
const FLEET_EPOCHS: TableDefinition<'_, &str, u64> = TableDefinition::new("fleet_epochs");

fn decode<M: Message + Default>(
    table: &'static str,
    key: &str,
    bytes: &[u8],
) -> Result<M, StoreError> {
    M::decode(bytes).map_err(|error| StoreError::Record {
        table,
        key: key.to_owned(),
        message: error.to_string(),
    })
}

impl FleetStore for RedbStore {
    fn put_seen(&self, changes: &SeenChanges) -> Result<(), StoreError> {
        const WHAT: &str = "write what was seen of the fleet";
        let write = self.database.begin_write().map_err(failed(WHAT))?;
        {
            let mut addresses = write.open_table(HOSTS).map_err(failed(WHAT))?;
            let mut hosts = write.open_table(FLEET_HOSTS).map_err(failed(WHAT))?;
            for (name, host) in &changes.hosts {
                let name = name.as_str();
                match host {
                    Some(host) => {
                        let bytes = host.encode_to_vec();
                        hosts.insert(name, bytes.as_slice()).map_err(failed(WHAT))?;
                    }
                    None => {
                        hosts.remove(name).map_err(failed(WHAT))?;
                        addresses.remove(name).map_err(failed(WHAT))?;
                    }
                }
            }
            let mut vms = write.open_table(FLEET_VMS).map_err(failed(WHAT))?;
            for ((host, uid), vm) in &changes.vms {
                let key = (host.as_str(), uid.as_str());
                match vm {
                    Some(vm) => {
                        let bytes = vm.encode_to_vec();
                        vms.insert(key, bytes.as_slice()).map_err(failed(WHAT))?;
                    }
                    None => drop(vms.remove(key).map_err(failed(WHAT))?),
                }
            }
            let mut epochs = write.open_table(FLEET_EPOCHS).map_err(failed(WHAT))?;
            for (uid, epoch) in &changes.epochs {
                match epoch {
                    Some(epoch) => drop(epochs.insert(uid.as_str(), epoch).map_err(failed(WHAT))?),
                    None => drop(epochs.remove(uid.as_str()).map_err(failed(WHAT))?),
                }
            }
        }
        write.commit().map_err(failed(WHAT))
    }

    fn seen(&self) -> Result<SeenFleet, StoreError> {
        const WHAT: &str = "read what was seen of the fleet";
        let mut seen = SeenFleet::default();
        // Made by the first write; read as empty until then.
        let write = self.database.begin_write().map_err(failed(WHAT))?;
        write.open_table(FLEET_HOSTS).map_err(failed(WHAT))?;
        write.open_table(FLEET_VMS).map_err(failed(WHAT))?;
        write.open_table(FLEET_EPOCHS).map_err(failed(WHAT))?;
        write.commit().map_err(failed(WHAT))?;
        let read = self.database.begin_read().map_err(failed(WHAT))?;
        let hosts = read.open_table(FLEET_HOSTS).map_err(failed(WHAT))?;
        for entry in hosts.iter().map_err(failed(WHAT))? {
            let (name, bytes) = entry.map_err(failed(WHAT))?;
            let host: v1::Host = decode("fleet_hosts", name.value(), bytes.value())?;
            seen.hosts.push(host);
        }
        let addresses = read.open_table(HOSTS).map_err(failed(WHAT))?;
        for entry in addresses.iter().map_err(failed(WHAT))? {
            let (name, address) = entry.map_err(failed(WHAT))?;
            if seen.hosts.iter().any(|host| host.name == name.value()) {
                continue;
            }
            seen.hosts.push(v1::Host {
                name: name.value().to_owned(),
                address: address.value().to_owned(),
                ..Default::default()
            });
        }
        let vms = read.open_table(FLEET_VMS).map_err(failed(WHAT))?;
        for entry in vms.iter().map_err(failed(WHAT))? {
            let (key, bytes) = entry.map_err(failed(WHAT))?;
            seen.vms
                .push(decode("fleet_vms", key.value().1, bytes.value())?);
        }
        let epochs = read.open_table(FLEET_EPOCHS).map_err(failed(WHAT))?;
        for entry in epochs.iter().map_err(failed(WHAT))? {
            let (uid, epoch) = entry.map_err(failed(WHAT))?;
            seen.epochs.push((uid.value().to_owned(), epoch.value()));
        }
        Ok(seen)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::contract::Store as _, *};

    fn host(name: &str) -> v1::Host {
        v1::Host {
            name: name.into(),
            address: "127.0.0.1:1".into(),
            cordoned: true,
            ..Default::default()
        }
    }

    fn vm(host: &str, uid: &str) -> v1::Vm {
        v1::Vm {
            name: "vms/web".into(),
            uid: uid.into(),
            host: host.into(),
            epoch: 3,
            ..Default::default()
        }
    }

    #[test]
    fn what_was_seen_survives_and_what_is_gone_does_not() {
        let directory = slat_test_dir::TestDir::new();
        let store = RedbStore::open(directory.path()).unwrap();
        assert_eq!(store.seen().unwrap(), SeenFleet::default());
        store.put_host("hosts/old", "127.0.0.1:9").unwrap();
        store.put_host("hosts/a", "127.0.0.1:2").unwrap();
        let put = |host: &str, uid: &str| ((host.into(), uid.into()), Some(vm(host, uid)));
        let changes = SeenChanges {
            hosts: vec![("hosts/a".into(), Some(host("hosts/a")))],
            vms: vec![
                put("hosts/a", "u"),
                put("hosts/b", "u"),
                put("hosts/a", "v"),
            ],
            epochs: vec![("u".into(), Some(3)), ("v".into(), Some(3))],
        };
        store.put_seen(&changes).unwrap();
        drop(store);

        let store = RedbStore::open(directory.path()).unwrap();
        let seen = store.seen().unwrap();
        // One that only the older table knows is a host all the same.
        let names: Vec<&str> = seen.hosts.iter().map(|host| host.name.as_str()).collect();
        assert_eq!(names, ["hosts/a", "hosts/old"]);
        assert!(seen.hosts[0].cordoned);
        assert_eq!(seen.vms.len(), 3);
        let gone = SeenChanges {
            hosts: vec![("hosts/a".into(), None)],
            vms: vec![
                (("hosts/a".into(), "u".into()), None),
                (("hosts/a".into(), "v".into()), None),
            ],
            epochs: vec![("v".into(), None)],
        };
        store.put_seen(&gone).unwrap();
        let seen = store.seen().unwrap();
        assert_eq!(seen.hosts.len(), 1);
        assert_eq!(seen.vms, [vm("hosts/b", "u")]);
        assert_eq!(seen.epochs, [("u".to_owned(), 3)]);
    }
}
