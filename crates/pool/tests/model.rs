//! Random calls on a pool and on a naive model of it, for every policy: both must agree on every
//! answer, and the pool must keep its promises after every call.

use std::cmp::Reverse;

use proptest::prelude::*;
use tierstream_pool::{Config, LayerCounters, LayerSpec, Lookup, Policy, Pool, Record, Slot};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Loading,
    Resident,
    Draining,
}

#[derive(Clone, Debug)]
struct ModelSlot {
    slot: Slot,
    state: State,
    record: Record,
    pins: u32,
    /// Step of the arrival.
    arrived: u64,
    /// Steps of the uses since the arrival.
    uses: Vec<u64>,
}

impl ModelSlot {
    fn holds(&self) -> bool {
        matches!(self.state, State::Loading | State::Resident)
    }

    fn evictable(&self) -> bool {
        self.state == State::Resident && self.pins == 0
    }
}

/// The pool as its documentation tells it, with a scan for every question.
#[derive(Clone, Debug)]
struct Model {
    config: Config,
    /// Slots that each class ever has.
    room: Vec<u32>,
    slots: Vec<ModelSlot>,
    resized: bool,
    /// Every use of every record: the record and the step.
    history: Vec<(Record, u64)>,
    arrived: Vec<Record>,
    counters: Vec<LayerCounters>,
    step: u64,
}

impl Model {
    fn new(config: &Config) -> Self {
        let nothing = Record { layer: 0, expert: 0 };
        let room = room(config);
        let slots = (0u32..).zip(&room).flat_map(|(class, &room)| {
            (0..room).map(move |index| ModelSlot {
                slot: Slot { class, index },
                state: State::Free,
                record: nothing,
                pins: 0,
                arrived: 0,
                uses: vec![],
            })
        });
        let slots = slots.collect();
        Self {
            slots,
            room,
            resized: false,
            history: vec![],
            arrived: vec![],
            counters: vec![LayerCounters::default(); config.layers.len()],
            config: config.clone(),
            step: 0,
        }
    }

    fn in_use(&self, slot: Slot) -> bool {
        slot.index < self.config.slots[slot.class as usize]
    }

    fn is_free(&self, s: &ModelSlot) -> bool {
        s.state == State::Free && self.in_use(s.slot)
    }

    fn class(&self, layer: u32) -> u32 {
        self.config.layers[layer as usize].class
    }

    fn floor(&self, layer: u32) -> usize {
        let spec = &self.config.layers[layer as usize];
        spec.floor.min(spec.experts) as usize
    }

    fn held(&self, layer: u32) -> usize {
        self.slots.iter().filter(|s| s.holds() && s.record.layer == layer).count()
    }

    fn lack(&self, layer: u32) -> usize {
        self.floor(layer).saturating_sub(self.held(layer))
    }

    fn find(&mut self, slot: Slot) -> &mut ModelSlot {
        self.slots.iter_mut().find(|s| s.slot == slot).unwrap()
    }

    fn peek(&self, record: Record) -> Lookup {
        match self.slots.iter().find(|s| s.holds() && s.record == record) {
            None => Lookup::Absent,
            Some(s) if s.state == State::Resident => Lookup::Resident(s.slot),
            Some(s) => Lookup::Loading(s.slot),
        }
    }

    fn request(&mut self, record: Record) -> Lookup {
        let found = self.peek(record);
        let counters = &mut self.counters[record.layer as usize];
        counters.requests += 1;
        match found {
            Lookup::Resident(slot) => {
                counters.hits += 1;
                self.touch(slot);
            }
            Lookup::Loading(slot) => {
                counters.hits_in_flight += 1;
                self.touch(slot);
            }
            Lookup::Absent => counters.faults += 1,
        }
        found
    }

    fn touch(&mut self, slot: Slot) {
        let step = self.step;
        let s = self.find(slot);
        s.pins += 1;
        s.uses.push(step);
        let record = s.record;
        self.history.push((record, step));
    }

    fn may_take_free(&self, layer: u32) -> bool {
        let class = self.class(layer);
        let free = self.slots.iter().filter(|s| s.slot.class == class && self.is_free(s));
        let others = (0..self.counters.len() as u32).filter(|&o| o != layer);
        let others = others.filter(|&o| self.class(o) == class);
        let free = free.count();
        free > 0 && (self.lack(layer) > 0 || free > others.map(|o| self.lack(o)).sum())
    }

    /// The slots that a request of this layer may evict; those used in this step only if there are
    /// no others.
    fn candidates(&self, layer: u32) -> Vec<&ModelSlot> {
        let class = self.class(layer);
        let all = self.slots.iter().filter(|s| s.slot.class == class && s.evictable());
        let all = all.filter(|s| {
            let owner = s.record.layer;
            owner == layer || self.held(owner) > self.floor(owner)
        });
        let all: Vec<_> = all.collect();
        let earlier = all.iter().copied().filter(|s| s.uses.last() != Some(&self.step));
        let earlier: Vec<_> = earlier.collect();
        if earlier.is_empty() { all } else { earlier }
    }

    /// Whom the policy sends away; `None` for those whose choice their own tests tell.
    fn victim(&self, candidates: &[&ModelSlot]) -> Option<Slot> {
        let score = |s: &ModelSlot| match self.config.policy {
            Policy::Lru => 0.0,
            Policy::Fifo => s.arrived as f64,
            Policy::Lfu { half_life } => {
                let half_life = u64::from(half_life) * self.counters.len() as u64;
                let uses = self.history.iter().filter(|(record, _)| *record == s.record);
                uses.map(|(_, step)| faded(self.step, *step, half_life)).sum()
            }
            Policy::Lfru => {
                let half_life = 4 * self.counters.len() as u64;
                s.uses.len() as f64 * faded(self.step, *s.uses.last().unwrap(), half_life)
            }
            Policy::Random | Policy::Slru | Policy::S3Fifo | Policy::LeastStale => f64::NAN,
        };
        let policy = self.config.policy;
        if matches!(policy, Policy::Random | Policy::Slru | Policy::S3Fifo | Policy::LeastStale) {
            return None;
        }
        let recency = |s: &ModelSlot| match policy {
            Policy::Fifo => 0,
            _ => *s.uses.last().unwrap(),
        };
        let key = |s: &ModelSlot| (score(s), recency(s), Reverse(s.record));
        let lowest = candidates.iter().min_by(|a, b| key(a).partial_cmp(&key(b)).unwrap());
        lowest.map(|s| s.slot)
    }

    fn put(&mut self, slot: Slot, record: Record) {
        let step = self.step;
        *self.find(slot) = ModelSlot {
            slot,
            state: State::Loading,
            record,
            pins: 1,
            arrived: step,
            uses: vec![step],
        };
        self.history.push((record, step));
    }

    fn arrive(&mut self, record: Record) {
        let bytes = self.config.layers[record.layer as usize].record_bytes;
        let counters = &mut self.counters[record.layer as usize];
        counters.bytes_faulted += bytes;
        if !self.arrived.contains(&record) {
            self.arrived.push(record);
            counters.first_touches += 1;
        }
    }

    fn unpin(&mut self, slot: Slot) {
        let s = self.find(slot);
        s.pins -= 1;
        if s.pins == 0 && s.state == State::Draining {
            s.state = State::Free;
        }
        self.evict_out_of_use();
    }

    /// What is in slots out of use, and not pinned, goes.
    fn evict_out_of_use(&mut self) {
        let slots = &self.config.slots;
        let out = |s: &ModelSlot| s.slot.index >= slots[s.slot.class as usize];
        for s in self.slots.iter_mut().filter(|s| out(s) && s.evictable()) {
            s.state = State::Free;
            self.counters[s.record.layer as usize].evictions += 1;
        }
    }

    fn resize(&mut self, slots: &[u32], floors: &[u32]) {
        let counts = slots.iter().zip(&self.room).map(|(&slots, &room)| slots.min(room));
        self.config.slots = counts.collect();
        let layers = self.config.layers.iter_mut();
        layers.zip(floors).for_each(|(spec, &floor)| spec.floor = floor);
        self.resized = true;
        self.evict_out_of_use();
    }

    fn end(&self, class: u32) -> u32 {
        let of_class = self.slots.iter().filter(|s| s.slot.class == class);
        let held = of_class.filter(|s| self.in_use(s.slot) || s.state != State::Free);
        held.map(|s| s.slot.index + 1).max().unwrap_or(0)
    }

    /// Whether a layer of the class has more than its floor, all of which is pinned now.
    fn is_full_of_pins(&self, class: u32) -> bool {
        let mut layers = 0..self.config.layers.len() as u32;
        layers.any(|layer| self.class(layer) == class && self.held(layer) > self.floor(layer))
    }

    fn forget(&mut self, wanted: impl Fn(Record) -> bool) -> u32 {
        let mut forgotten = 0;
        for s in self.slots.iter_mut().filter(|s| s.evictable() && wanted(s.record)) {
            s.state = State::Free;
            forgotten += 1;
        }
        forgotten
    }

    fn records(&self) -> impl Iterator<Item = Record> + '_ {
        (0u32..)
            .zip(&self.config.layers)
            .flat_map(|(layer, spec)| (0..spec.experts).map(move |expert| Record { layer, expert }))
    }

    fn slots_in(&self, matches: impl Fn(&ModelSlot) -> bool) -> Vec<Slot> {
        self.slots.iter().filter(|s| matches(s)).map(|s| s.slot).collect()
    }
}

/// Slots that each class ever has.
fn room(config: &Config) -> Vec<u32> {
    let records = |class: u32| {
        config.layers.iter().filter(|spec| spec.class == class).map(|spec| spec.experts).sum()
    };
    (0u32..).zip(&config.slots).map(|(class, &slots)| slots.max(records(class))).collect()
}

fn faded(now: u64, then: u64, half_life: u64) -> f64 {
    2f64.powi(-((now / half_life - then / half_life) as i32))
}

/// Kind of call and two numbers that choose its argument.
type Op = (u8, usize, u32);

/// What a call answered, to compare two runs.
#[derive(Clone, Debug, PartialEq)]
struct Answer(Op, String);

struct Run {
    pool: Pool,
    model: Model,
    answers: Vec<Answer>,
}

impl Run {
    fn new(config: &Config) -> Self {
        let pool = Pool::new(config.clone()).unwrap();
        Self { pool, model: Model::new(config), answers: vec![] }
    }

    fn apply(&mut self, op: Op) {
        let (kind, chosen, number) = op;
        let layer = (chosen % self.model.config.layers.len()) as u32;
        let expert = number % self.model.config.layers[layer as usize].experts;
        let record = Record { layer, expert };
        let answer = match kind {
            0..=19 => {
                self.pool.begin_step();
                self.model.step += 1;
                String::new()
            }
            20..=44 => {
                let found = self.pool.request(record);
                assert_eq!(found, self.model.request(record));
                format!("{found:?}")
            }
            45..=69 => self.reserve(record),
            70..=79 => self.on_slot(chosen, State::Loading, |run, slot| {
                run.pool.commit(slot);
                let s = run.model.find(slot);
                s.state = State::Resident;
                let record = s.record;
                run.model.arrive(record);
            }),
            80..=82 => self.on_slot(chosen, State::Loading, |run, slot| {
                run.pool.abandon(slot);
                let s = run.model.find(slot);
                s.state = if s.pins > 1 { State::Draining } else { State::Free };
                s.pins -= 1;
            }),
            83..=95 => self.unpin(chosen),
            96 => {
                self.pool.stream(record);
                self.model.arrive(record);
                String::new()
            }
            97 => {
                let held = self.pool.hold(record);
                let resident = match self.model.peek(record) {
                    Lookup::Resident(slot) => Some(slot),
                    Lookup::Loading(_) | Lookup::Absent => None,
                };
                assert_eq!(held, resident);
                resident.into_iter().for_each(|slot| self.model.find(slot).pins += 1);
                format!("{held:?}")
            }
            98 => {
                let evictable = self.pool.is_evictable(record);
                let forgotten = self.pool.evict(record);
                assert_eq!(evictable, forgotten);
                assert_eq!(u32::from(forgotten), self.model.forget(|r| r == record));
                format!("{forgotten}")
            }
            99 => {
                let forgotten = self.pool.clear();
                assert_eq!(forgotten, self.model.forget(|_| true));
                format!("{forgotten}")
            }
            _ => self.resize(chosen, number),
        };
        self.answers.push(Answer(op, answer));
    }

    /// To any number of slots from one below the floors to some more than there is room for, and
    /// with other floors now and then.
    fn resize(&mut self, chosen: usize, number: u32) -> String {
        let layers = &self.model.config.layers;
        let floors: Vec<u32> = match number % 3 {
            0 => layers.iter().map(|spec| spec.floor / 2).collect(),
            1 => layers.iter().map(|spec| spec.floor + 1).collect(),
            _ => layers.iter().map(|spec| spec.floor).collect(),
        };
        let specs = layers.iter().zip(&floors).map(|(spec, &floor)| LayerSpec { floor, ..*spec });
        let least = Pool::least_slots(&specs.collect::<Vec<_>>(), 2);
        let room = &self.model.room;
        let slots = |class: usize| {
            let lowest = least[class].saturating_sub(1);
            let choice = chosen >> (8 * class);
            lowest + (choice % (room[class].saturating_sub(lowest) as usize + 3)) as u32
        };
        let slots = [slots(0), slots(1)];
        let resized = self.pool.resize(&slots, &floors);
        assert_eq!(resized.is_ok(), slots.iter().zip(least).all(|(&slots, least)| slots >= least));
        if resized.is_ok() {
            self.model.resize(&slots, &floors);
        }
        format!("{resized:?}")
    }

    fn reserve(&mut self, record: Record) -> String {
        if self.model.peek(record) != Lookup::Absent {
            return String::new();
        }
        let layer = record.layer;
        let below_floor = self.model.lack(layer) > 0;
        let class = self.model.class(layer);
        let draining = self.model.slots.iter().any(|s| s.state == State::Draining);
        let free = self.model.may_take_free(layer);
        let candidates = self.model.candidates(layer);
        let given = self.pool.reserve(record);
        let answer = format!("{given:?}");
        match given {
            None => {
                assert!(!free && candidates.is_empty());
                let full = self.model.resized && self.model.is_full_of_pins(class);
                assert!(!below_floor || draining || full, "a layer below its floor was refused");
            }
            Some(given) if free => {
                assert_eq!(given.evicted, None);
                let s = self.model.find(given.slot).clone();
                assert!(self.model.is_free(&s), "{s:?}");
                self.model.put(given.slot, record);
            }
            Some(given) => {
                let victim = candidates.iter().find(|s| s.slot == given.slot);
                let victim = victim.expect("the victim is a candidate");
                assert!(self.model.in_use(given.slot));
                assert_eq!(given.evicted, Some(victim.record));
                if let Some(expected) = self.model.victim(&candidates) {
                    assert_eq!(given.slot, expected, "the naive victim");
                }
                let owner = victim.record.layer;
                self.model.counters[owner as usize].evictions += 1;
                self.model.put(given.slot, record);
                let floor = self.model.floor(owner);
                assert!(owner == layer || self.model.held(owner) >= floor, "floor broken");
            }
        }
        answer
    }

    fn on_slot(&mut self, chosen: usize, state: State, act: impl Fn(&mut Self, Slot)) -> String {
        let slots = self.model.slots_in(|s| s.state == state);
        if slots.is_empty() {
            return String::new();
        }
        let slot = slots[chosen % slots.len()];
        act(self, slot);
        format!("{slot:?}")
    }

    fn unpin(&mut self, chosen: usize) -> String {
        let spare = |s: &ModelSlot| s.pins > u32::from(s.state == State::Loading);
        let slots = self.model.slots_in(spare);
        if slots.is_empty() {
            return String::new();
        }
        let slot = slots[chosen % slots.len()];
        self.pool.unpin(slot);
        self.model.unpin(slot);
        format!("{slot:?}")
    }

    /// What somebody has who looks every record up.
    fn slots_of_records(&self) -> Vec<Option<Slot>> {
        let slot = |record| match self.pool.peek(record) {
            Lookup::Resident(slot) | Lookup::Loading(slot) => Some(slot),
            Lookup::Absent => None,
        };
        self.model.records().map(slot).collect()
    }

    fn check(&self) {
        let Self { pool, model, .. } = self;
        assert_eq!(pool.is_idle(), model.slots.iter().all(|s| s.pins == 0));
        assert_eq!(pool.counters(), model.counters);
        for counters in pool.counters() {
            let answers = counters.hits + counters.hits_in_flight + counters.faults;
            assert_eq!(counters.requests, answers);
        }
        for record in model.records() {
            assert_eq!(pool.peek(record), model.peek(record));
        }
        for s in &model.slots {
            assert_eq!(pool.record_in(s.slot), s.holds().then_some(s.record));
        }
        let is_resident = |&record: &Record| matches!(pool.peek(record), Lookup::Resident(_));
        let resident: Vec<_> = model.records().filter(is_resident).collect();
        for (layer, spec) in (0u32..).zip(&model.config.layers) {
            let count = resident.iter().filter(|record| record.layer == layer).count();
            assert_eq!(pool.resident(layer) as usize, count);
            assert!(count <= spec.experts as usize);
        }
        let bytes = |record: &Record| model.config.layers[record.layer as usize].record_bytes;
        assert_eq!(pool.resident_bytes(), resident.iter().map(bytes).sum::<u64>());
        for (class, &slots) in (0u32..).zip(&model.config.slots) {
            assert_eq!((pool.slots(class), pool.end(class)), (slots, model.end(class)));
        }
        for layer in 0..model.config.layers.len() as u32 {
            self.check_reservable(layer);
        }
    }

    /// Counts by trying it on a copy. A layer that runs out of absent records proves no more.
    fn check_reservable(&self, layer: u32) {
        let mut pool = self.pool.clone();
        let expected = pool.reservable(layer);
        let mut given = 0;
        let refused = loop {
            let mut records = self.model.records().filter(|record| record.layer == layer);
            match records.find(|&record| pool.peek(record) == Lookup::Absent) {
                None => break false,
                Some(record) if pool.reserve(record).is_none() => break true,
                Some(_) => given += 1,
            }
        };
        assert!(given <= expected && (!refused || given == expected), "{given} of {expected}");
    }
}

fn configs(policy: Policy) -> impl Strategy<Value = Config> {
    let layer = (0u32..2, 1u32..7, 0u32..4, 1u64..100);
    let spare = prop::collection::vec(0u32..5, 2);
    (prop::collection::vec(layer, 1..5), spare, any::<u64>()).prop_map(
        move |(layers, spare, seed)| {
            let layers = layers.into_iter().map(|(class, experts, floor, record_bytes)| {
                LayerSpec { class, experts, floor, record_bytes }
            });
            let layers = layers.collect::<Vec<_>>();
            let least = Pool::least_slots(&layers, 2);
            let slots = least.iter().zip(spare).map(|(least, spare)| least + spare).collect();
            Config { layers, slots, policy, seed }
        },
    )
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec((0u8..103, any::<usize>(), any::<u32>()), 1..250)
}

fn agrees(config: &Config, ops: &[Op]) {
    let mut run = Run::new(config);
    for &op in ops {
        let (changes, before) = (run.pool.changes(), run.slots_of_records());
        run.apply(op);
        run.check();
        assert!(before == run.slots_of_records() || changes != run.pool.changes(), "{op:?}");
    }
    let mut again = Run::new(config);
    ops.iter().for_each(|&op| again.apply(op));
    assert_eq!(run.answers, again.answers, "equal calls, equal answers");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn lru(config in configs(Policy::Lru), ops in ops()) {
        agrees(&config, &ops);
    }

    #[test]
    fn lfu(config in configs(Policy::LFU), ops in ops()) {
        agrees(&config, &ops);
    }

    #[test]
    fn lfu_that_fades_fast(config in configs(Policy::Lfu { half_life: 1 }), ops in ops()) {
        agrees(&config, &ops);
    }

    #[test]
    fn lfru(config in configs(Policy::Lfru), ops in ops()) {
        agrees(&config, &ops);
    }

    #[test]
    fn fifo(config in configs(Policy::Fifo), ops in ops()) {
        agrees(&config, &ops);
    }

    #[test]
    fn random(config in configs(Policy::Random), ops in ops()) {
        agrees(&config, &ops);
    }

    #[test]
    fn slru(config in configs(Policy::Slru), ops in ops()) {
        agrees(&config, &ops);
    }

    #[test]
    fn s3_fifo(config in configs(Policy::S3Fifo), ops in ops()) {
        agrees(&config, &ops);
    }

    #[test]
    fn least_stale(config in configs(Policy::LeastStale), ops in ops()) {
        agrees(&config, &ops);
    }
}
