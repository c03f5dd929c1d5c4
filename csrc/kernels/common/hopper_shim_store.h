// Copies out of shared memory of hopper_shim.h, and the groups in which a thread waits for them.
//
// After the PTX ISA ("cp.async.bulk.tensor", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group"). A copy reads
// shared memory when its thread waits for that and no other thread can go on; what it read comes to global memory when
// the thread waits for that, or else when the launch ends. Shared memory that is not what it was when the copy was
// asked for was overwritten too early.
#pragma once

#include <deque>

#include "kernels/common/hopper_shim_tma.h"

namespace u4d::hopper_shim {

// A row's part that is inside the tensor, on its way to global memory.
struct Write {
  unsigned char* to;
  std::vector<unsigned char> bytes;
};

struct Store {
  Box box;
  std::vector<unsigned char> held;  // by shared memory when the copy was asked for
};

// The copies of one thread, in the order in which it asked for them.
struct StoreQueue {
  int issued = 0, read = 0, written = 0;     // copies so far
  int wanted_read = 0, wanted_written = 0;   // that the thread waits for
  std::vector<int> commits;                  // copies issued before each commit
  std::deque<Store> unread;                  // the first is number `read`
  std::deque<std::vector<Write>> unwritten;  // the first is number `written`

  // How many copies are in groups older than the youngest `pending` ones.
  int committed_before(std::size_t pending) const {
    return commits.size() <= pending ? 0 : commits[commits.size() - 1 - pending];
  }
};
inline std::map<int, StoreQueue> store_queues;  // by thread
inline std::vector<Write> late_writes;          // of blocks that have ended

inline StoreQueue& my_stores() { return store_queues[host_shim::current]; }

inline void perform(const Write& write) { std::memcpy(write.to, write.bytes.data(), write.bytes.size()); }

inline void check_not_being_read(const Box& box) {
  for (const auto& [thread, queue] : store_queues) {
    for (const Store& store : queue.unread) {
      if (!box.meets(store.box)) continue;
      fail("a copy into shared memory from byte %u on, which a copy of thread %d may still read", box.shared, thread);
    }
  }
}

template <int kRank>
void issue_store(const CUtensorMap* map, const void* shared, const int (&at)[kRank]) {
  const Box box = box_at(shared, map, at, "a copy's source");
  const unsigned char *seen = async_view() + box.shared, *written = host_shim::dynamic_shared + box.shared;
  if (std::memcmp(seen, written, box.bytes)) {
    fail("a copy from shared memory that was written without fence_async_shared, from byte %u on", box.shared);
  }
  StoreQueue& mine = my_stores();
  mine.unread.push_back({box, {written, written + box.bytes}});
  ++mine.issued;
}

inline Write read_row(const Box& box, unsigned row) {
  const Inside inside = inside_of_row(box);
  unsigned char* to = row_at(box, row);
  if (!to || inside.first == inside.last) return {};
  std::vector<unsigned char> bytes(box.row_bytes());
  for (unsigned piece = 0; piece < box.row_bytes(); piece += 16) {
    const unsigned from = swizzled(box.shared + row * box.row_bytes() + piece, box.map.swizzle);
    std::memcpy(bytes.data() + piece, host_shim::dynamic_shared + from, 16);
  }
  return {to + inside.offset, {bytes.data() + inside.first, bytes.data() + inside.last}};
}

inline void read_next(StoreQueue& queue) {
  const Store& store = queue.unread.front();
  if (std::memcmp(store.held.data(), host_shim::dynamic_shared + store.box.shared, store.box.bytes)) {
    fail("shared memory from byte %u on was written while a copy from it was under way", store.box.shared);
  }
  std::vector<Write> rows;
  for (unsigned row = 0; row < store.box.rows(); ++row) {
    Write write = read_row(store.box, row);
    if (write.to) rows.push_back(std::move(write));
  }
  queue.unwritten.push_back(rows);
  queue.unread.pop_front();
  ++queue.read;
}

inline void write_next(StoreQueue& queue) {
  for (const Write& write : queue.unwritten.front()) perform(write);
  queue.unwritten.pop_front();
  ++queue.written;
}

// Threads that wait for copies.
inline std::vector<StoreQueue*> wanted_stores() {
  std::vector<StoreQueue*> wanted;
  for (auto& [thread, queue] : store_queues) {
    if (queue.read < queue.wanted_read || queue.written < queue.wanted_written) wanted.push_back(&queue);
  }
  return wanted;
}

inline void go_on(StoreQueue& queue) {
  if (queue.read < queue.wanted_read) {
    read_next(queue);
  } else {
    write_next(queue);
  }
}

// The block's shared memory is gone: what reads it must be over. What goes to global memory may still be under way.
inline void end_stores() {
  for (auto& [thread, queue] : store_queues) {
    if (!queue.unread.empty()) {
      fail("the block ended while %zu copies of thread %d may still read its shared memory", queue.unread.size(),
           thread);
    }
    for (const std::vector<Write>& rows : queue.unwritten)
      late_writes.insert(late_writes.end(), rows.begin(), rows.end());
  }
}

}  // namespace u4d::hopper_shim
