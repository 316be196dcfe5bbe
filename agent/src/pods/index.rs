//! What is known of the node's pods, and what is to become of each.
//!
//! A plain state: events in, actions out. It is owned by one task
//! ([`super::watch`] and [`super::PodsHandle`] talk to that), and is tested without
//! a cluster.
//!
//! Pods are told apart by their uid alone. A name can belong to one pod after
//! another, and so can an IP address, which is not even looked at.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Dns, NotRedirected, Pod, PodRef, desired, select};
use crate::settings::{Settings, SettingsError};

/// What the index is told.
#[derive(Clone, Debug)]
pub enum Event {
    /// A list of all pods begins.
    Listing,
    /// A pod of that list.
    Listed(Pod),
    /// The list is complete: what was not in it is gone.
    ListDone,
    /// A pod is there, or has changed.
    Applied(Pod),
    /// A pod is gone.
    Deleted(PodRef),
    /// Somebody has asked the API for this pod, before the watch told of it.
    Fetched(Pod),
    /// The API has been asked for a doubtful pod, and has it.
    Present(PodRef),
    /// The API has been asked for a doubtful pod and does not have it any more.
    Absent(PodRef),
}

/// What follows from an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// This is to become of a pod, which is new or was to become something else.
    Decided(PodRef, Decision),
    /// A pod is gone.
    Gone(PodRef),
    /// The API has to be asked whether this pod is still there.
    Doubt(PodRef),
    /// All pods of the node are known, for the first time.
    Synced,
}

/// What is to become of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is redirected with these settings.
    Redirect(Arc<Settings>),
    /// It is left alone.
    Leave(NotRedirected),
    /// It should be redirected, and does not say how in a way that can be
    /// understood. What was in force stays.
    Refuse(Box<SettingsError>),
}

/// A pod and what is to become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Which pod.
    pub pod: PodRef,
    /// What is to become of it.
    pub decision: Decision,
    /// Where it gets its nameservers from.
    pub dns: Dns,
}

/// Who told of a pod.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    List,
    Watch,
    Request,
}

struct Entry {
    known: Known,
    /// The watch has not told of it yet.
    fetched: bool,
}

/// The pods of the node, by uid.
pub struct Index {
    excluded_namespaces: BTreeSet<String>,
    pods: BTreeMap<String, Entry>,
    /// The uids of a list that is not complete yet.
    listing: Option<BTreeSet<String>>,
    /// The pods of which the API has to be asked.
    doubtful: BTreeMap<String, PodRef>,
    synced: bool,
}

impl Index {
    /// An index that knows of no pod. Those of the given namespaces are left alone.
    pub fn new(excluded_namespaces: BTreeSet<String>) -> Self {
        Self {
            excluded_namespaces,
            pods: BTreeMap::new(),
            listing: None,
            doubtful: BTreeMap::new(),
            synced: false,
        }
    }

    /// Takes an event in; says what follows from it.
    pub fn apply(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Listing => {
                self.listing = Some(BTreeSet::new());
                Vec::new()
            }
            Event::Listed(pod) => {
                if let Some(listing) = &mut self.listing {
                    listing.insert(pod.id.uid.clone());
                }
                self.insert(pod, Source::List)
            }
            Event::ListDone => self.list_done(),
            Event::Applied(pod) => self.insert(pod, Source::Watch),
            // The watch knows better, and may have been quicker.
            Event::Fetched(pod) if self.pods.contains_key(&pod.id.uid) => Vec::new(),
            Event::Fetched(pod) => self.insert(pod, Source::Request),
            Event::Present(pod) => {
                self.doubtful.remove(&pod.uid);
                Vec::new()
            }
            Event::Deleted(pod) | Event::Absent(pod) => self.remove(&pod.uid),
        }
    }

    /// What is known of a pod, of this incarnation.
    pub fn get(&self, uid: &str) -> Option<&Known> {
        self.pods.get(uid).map(|entry| &entry.known)
    }

    /// All that is known.
    pub fn all(&self) -> impl Iterator<Item = &Known> {
        self.pods.values().map(|entry| &entry.known)
    }

    /// The pods of which the API has to be asked.
    pub fn doubtful(&self) -> impl Iterator<Item = &PodRef> {
        self.doubtful.values()
    }

    /// Whether all pods of the node have been known once.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// What is to become of a pod; it need not be in the index.
    pub fn decide(&self, pod: &Pod) -> Decision {
        let sidecar = match select(pod, &self.excluded_namespaces) {
            Ok(sidecar) => sidecar,
            Err(why) => return Decision::Leave(why),
        };
        match desired(pod, sidecar) {
            Ok(settings) => Decision::Redirect(Arc::new(settings)),
            Err(error) => Decision::Refuse(Box::new(error)),
        }
    }

    fn insert(&mut self, pod: Pod, source: Source) -> Vec<Action> {
        let known = Known {
            decision: self.decide(&pod),
            pod: pod.id,
            dns: pod.dns,
        };
        let fetched = source == Source::Request;
        if !fetched {
            self.doubtful.remove(&known.pod.uid);
        }
        let mut actions = match source {
            // Its end settles everything.
            Source::List => Vec::new(),
            Source::Watch | Source::Request => self.doubt_namesakes(&known.pod),
        };
        let (pod, decision) = (known.pod.clone(), known.decision.clone());
        let before = self.pods.insert(pod.uid.clone(), Entry { known, fetched });
        if before.is_none_or(|before| before.known.decision != decision) {
            actions.push(Action::Decided(pod, decision));
        }
        actions
    }

    /// There is one pod of a name at a time, so the others are gone and the watch
    /// missed it; or this event is late, and it is this one that is gone. The API
    /// knows.
    fn doubt_namesakes(&mut self, pod: &PodRef) -> Vec<Action> {
        if self.pods.contains_key(&pod.uid) {
            return Vec::new();
        }
        let is_namesake = |other: &&PodRef| {
            (&other.namespace, &other.name, true)
                == (&pod.namespace, &pod.name, other.uid != pod.uid)
        };
        let namesakes: Vec<PodRef> = self
            .all()
            .map(|known| &known.pod)
            .filter(is_namesake)
            .cloned()
            .collect();
        if namesakes.is_empty() {
            return Vec::new();
        }
        let doubted = namesakes.into_iter().chain([pod.clone()]);
        doubted.filter_map(|pod| self.doubt(pod)).collect()
    }

    fn doubt(&mut self, pod: PodRef) -> Option<Action> {
        let is_new = self.doubtful.insert(pod.uid.clone(), pod.clone()).is_none();
        is_new.then_some(Action::Doubt(pod))
    }

    fn list_done(&mut self) -> Vec<Action> {
        let Some(listed) = self.listing.take() else {
            return Vec::new();
        };
        let missing: Vec<(PodRef, bool)> = self
            .pods
            .values()
            .filter(|entry| !listed.contains(&entry.known.pod.uid))
            .map(|entry| (entry.known.pod.clone(), entry.fetched))
            .collect();
        let mut actions = Vec::new();
        for (pod, fetched) in missing {
            // What was fetched may be younger than the list.
            if fetched {
                actions.extend(self.doubt(pod));
            } else {
                actions.extend(self.remove(&pod.uid));
            }
        }
        if !self.synced {
            self.synced = true;
            actions.push(Action::Synced);
        }
        actions
    }

    fn remove(&mut self, uid: &str) -> Vec<Action> {
        self.doubtful.remove(uid);
        let gone = self.pods.remove(uid);
        gone.map(|entry| Action::Gone(entry.known.pod))
            .into_iter()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::pods::tests::{manifest, pod};

    fn index() -> Index {
        Index::new(BTreeSet::from(["kube-system".to_owned()]))
    }

    /// A pod of Istio of this name and uid.
    fn named(name: &str, uid: &str) -> Pod {
        let mut full = manifest("istio");
        full["metadata"]["name"] = json!(name);
        full["metadata"]["uid"] = json!(uid);
        pod(&full)
    }

    fn annotated(name: &str, uid: &str, annotation: &str, text: &str) -> Pod {
        let mut pod = named(name, uid);
        pod.annotations
            .insert(annotation.to_owned(), text.to_owned());
        pod
    }

    fn redirect(flags: &str) -> Decision {
        Decision::Redirect(Arc::new(
            crate::settings::tests::settings(flags).expect("good flags"),
        ))
    }

    fn relist(index: &mut Index, pods: &[Pod]) -> Vec<Action> {
        let mut actions = index.apply(Event::Listing);
        for pod in pods {
            actions.extend(index.apply(Event::Listed(pod.clone())));
        }
        actions.extend(index.apply(Event::ListDone));
        actions
    }

    #[test]
    fn a_pod_comes_changes_and_goes() {
        let mut index = index();
        let web = named("web", "1");
        let comes = index.apply(Event::Applied(web.clone()));
        assert_eq!(
            comes,
            [Action::Decided(web.id.clone(), redirect("--mesh istio"))]
        );
        // Its status changes a dozen times while it starts.
        assert_eq!(index.apply(Event::Applied(web.clone())), []);
        let ports = "traffic.sidecar.istio.io/excludeOutboundPorts";
        let changed = index.apply(Event::Applied(annotated("web", "1", ports, "3306")));
        let settings = redirect("--mesh istio -o 3306");
        assert_eq!(changed, [Action::Decided(web.id.clone(), settings)]);
        let wrong = index.apply(Event::Applied(annotated("web", "1", ports, "x")));
        assert!(
            matches!(&wrong[..], [Action::Decided(_, Decision::Refuse(_))]),
            "{wrong:?}"
        );
        let off = annotated("web", "1", "sidecar.istio.io/interceptionMode", "NONE");
        assert_eq!(
            index.apply(Event::Applied(off)),
            [Action::Decided(
                web.id.clone(),
                Decision::Leave(NotRedirected::InterceptionOff)
            )]
        );
        let gone = Event::Deleted(web.id.clone());
        assert_eq!(index.apply(gone.clone()), [Action::Gone(web.id)]);
        assert_eq!(index.apply(gone), []);
        assert_eq!(index.all().count(), 0);
    }

    #[test]
    fn what_a_new_list_does_not_have_is_gone() {
        let mut index = index();
        let (a, b, c) = (named("a", "1"), named("b", "2"), named("c", "3"));
        let first = relist(&mut index, &[a.clone(), b.clone()]);
        assert_eq!(first.last(), Some(&Action::Synced));
        assert!(index.is_synced());
        // After 410: b's deletion was missed, and so was c's coming.
        let second = relist(&mut index, &[a.clone(), c.clone()]);
        assert_eq!(
            second,
            [
                Action::Decided(c.id, redirect("--mesh istio")),
                Action::Gone(b.id)
            ]
        );
    }

    #[test]
    fn a_list_that_breaks_off_takes_nothing_away() {
        let mut index = index();
        let (a, b) = (named("a", "1"), named("b", "2"));
        relist(&mut index, &[a.clone(), b.clone()]);
        index.apply(Event::Listing);
        index.apply(Event::Listed(a.clone()));
        // The API server went away, and begins anew.
        assert_eq!(relist(&mut index, &[a, b]), []);
        assert_eq!(index.apply(Event::ListDone), []);
    }

    #[test]
    fn of_a_name_with_two_incarnations_the_api_is_asked() {
        let mut index = index();
        let (old, new) = (named("db-0", "1"), named("db-0", "2"));
        relist(&mut index, std::slice::from_ref(&old));
        let rebuilt = index.apply(Event::Applied(new.clone()));
        assert_eq!(
            rebuilt,
            [
                Action::Doubt(old.id.clone()),
                Action::Doubt(new.id.clone()),
                Action::Decided(new.id.clone(), redirect("--mesh istio")),
            ]
        );
        assert_eq!(
            index.apply(Event::Absent(old.id.clone())),
            [Action::Gone(old.id)]
        );
        assert_eq!(index.doubtful().collect::<Vec<_>>(), [&new.id]);
        assert_eq!(index.apply(Event::Present(new.id.clone())), []);
        assert_eq!(index.doubtful().count(), 0);
        // The same name in another namespace is somebody else.
        let mut elsewhere = named("db-0", "3");
        elsewhere.id.namespace = "other".to_owned();
        assert_eq!(index.apply(Event::Applied(elsewhere)).len(), 1);
    }

    #[test]
    fn what_was_fetched_survives_an_older_list() {
        let mut index = index();
        let fetched = named("job", "9");
        assert_eq!(index.apply(Event::Fetched(fetched.clone())).len(), 1);
        assert_eq!(
            relist(&mut index, &[]),
            [Action::Doubt(fetched.id.clone()), Action::Synced]
        );
        assert!(index.get("9").is_some());
        // The API has it, and the watch tells of it in the end.
        assert_eq!(index.apply(Event::Applied(fetched.clone())), []);
        assert_eq!(index.doubtful().count(), 0);
        assert_eq!(relist(&mut index, &[]), [Action::Gone(fetched.id.clone())]);
        // An answer that is late does not beat the watch.
        index.apply(Event::Applied(annotated(
            "job",
            "9",
            "shunt.io/splice",
            "off",
        )));
        assert_eq!(index.apply(Event::Fetched(fetched)), []);
    }

    /// One pod of the cluster, over time.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Create,
        Annotate,
        Delete,
        /// The agent does not hear of anything until the next list.
        Deaf,
        Relist,
    }

    proptest! {
        /// Whatever is missed: after a list the index has what the API has, and who
        /// followed the actions has the same.
        #[test]
        fn a_list_brings_the_truth(steps in prop::collection::vec(
            (0..3_u8, prop::sample::select(vec![
                Step::Create, Step::Annotate, Step::Delete, Step::Deaf, Step::Relist,
            ])), 0..60,
        )) {
            let mut index = index();
            let mut api: BTreeMap<String, Pod> = BTreeMap::new();
            let mut told: BTreeMap<String, Decision> = BTreeMap::new();
            let (mut uid, mut deaf) = (0, true);
            for (name, step) in steps.into_iter().chain([(0, Step::Relist)]) {
                let name = format!("pod-{name}");
                let event = match step {
                    Step::Create => {
                        uid += 1;
                        let pod = named(&name, &uid.to_string());
                        let before = api.insert(name, pod.clone());
                        if let (Some(before), false) = (before, deaf) {
                            follow(&mut told, index.apply(Event::Deleted(before.id)));
                        }
                        Some(Event::Applied(pod))
                    }
                    Step::Annotate => api.get_mut(&name).map(|pod| {
                        pod.annotations.insert(
                            "sidecar.istio.io/interceptionMode".to_owned(),
                            "NONE".to_owned(),
                        );
                        Event::Applied(pod.clone())
                    }),
                    Step::Delete => api.remove(&name).map(|pod| Event::Deleted(pod.id)),
                    Step::Deaf => { deaf = true; None }
                    Step::Relist => {
                        deaf = false;
                        let pods: Vec<Pod> = api.values().cloned().collect();
                        follow(&mut told, relist(&mut index, &pods));
                        let true_now: BTreeMap<String, Decision> = pods
                            .iter()
                            .map(|pod| (pod.id.uid.clone(), index.decide(pod)))
                            .collect();
                        prop_assert_eq!(&told, &true_now);
                        prop_assert_eq!(index.all().count(), pods.len());
                        prop_assert_eq!(index.doubtful().count(), 0);
                        None
                    }
                };
                if let (Some(event), false) = (event, deaf) {
                    follow(&mut told, index.apply(event));
                }
            }
        }
    }

    fn follow(told: &mut BTreeMap<String, Decision>, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Decided(pod, decision) => {
                    told.insert(pod.uid, decision);
                }
                Action::Gone(pod) => {
                    told.remove(&pod.uid);
                }
                Action::Doubt(_) | Action::Synced => {}
            }
        }
    }
}
