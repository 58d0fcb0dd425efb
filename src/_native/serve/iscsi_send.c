/* Send: answers become PDUs, many in one call; a long data-in becomes several
 * PDUs, none longer than the initiator receives.  A batch is made, sent whole,
 * and only then what it took from is given back. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "base/crc32c.h"
#include "base/status.h"
#include "serve/iscsi_internal.h"

/* It never goes back: what the initiator was once allowed to send is not dropped. */
uint32_t iscsi_max_cmd_sn(struct iscsi_connection *c)
{
    uint32_t used = c->tasks_count < ISCSI_WINDOW ? c->tasks_count : ISCSI_WINDOW;
    uint32_t most = c->exp_cmd_sn + (ISCSI_WINDOW - used) - 1;
    if ((int32_t)(most - c->max_cmd_sn) > 0)
        c->max_cmd_sn = most;
    return c->max_cmd_sn;
}

void iscsi_queue(struct iscsi_connection *c, struct iscsi_item *item)
{
    item->next = NULL;
    if (c->out_last != NULL)
        c->out_last->next = item;
    else
        c->out_first = item;
    c->out_last = item;
    if (!c->replied) {
        c->replied = true;
        c->next_replied = c->server->replied_first;
        c->server->replied_first = c;
    }
}

bool iscsi_queue_pdu(struct iscsi_connection *c, const uint8_t *bhs, const void *data,
                     uint32_t bytes, bool counts)
{
    struct vrep_iscsi_server *server = c->server;
    struct iscsi_item *item = server->free_item; /* in steady state there is one */
    if (item != NULL)
        server->free_item = item->next;
    else
        item = malloc(sizeof *item);
    uint8_t *copy = bytes > 0 ? malloc(bytes) : NULL;
    if (item == NULL || (bytes > 0 && copy == NULL)) {
        free(item);
        free(copy);
        iscsi_end(c, vrep_status_text(VREP_E_NOMEM));
        return false;
    }
    *item = (struct iscsi_item){0};
    memcpy(item->bhs, bhs, ISCSI_BHS);
    if (bytes > 0)
        memcpy(copy, data, bytes);
    item->data = copy;
    item->data_bytes = bytes;
    item->counts = counts;
    c->queued++;
    iscsi_queue(c, item);
    return true;
}

static void give_item(struct iscsi_connection *c, struct iscsi_item *item)
{
    struct vrep_iscsi_server *server = c->server;
    if (item->task != NULL) {
        iscsi_task_give(item->task);
        return;
    }
    free(item->data);
    c->queued--;
    server->freed = true;
    item->next = server->free_item;
    server->free_item = item;
}

void iscsi_drop_queue(struct iscsi_connection *c)
{
    struct iscsi_item *lists[] = {c->sent_first, c->out_first};
    c->sent_first = c->sent_last = c->out_first = c->out_last = NULL;
    for (int i = 0; i < 2; i++)
        for (struct iscsi_item *item = lists[i], *next; item != NULL; item = next) {
            next = item->next;
            give_item(c, item);
        }
}

/* ---- making PDUs ------------------------------------------------------------------ */

static bool room(const struct iscsi_connection *c, uint32_t pdus)
{
    return pdus < ISCSI_BATCH_PDUS && c->batch_count + VREP_BUFFER_PAGES_MAX + 4 < ISCSI_BATCH_IOV;
}

static void add(struct iscsi_connection *c, void *base, size_t bytes)
{
    c->batch[c->batch_count++] = (struct iovec){base, bytes};
}

/* The bytes [from, from + bytes) of a task's data-in. */
static void add_data(struct iscsi_connection *c, const struct iovec *iov, int count, uint32_t from,
                     uint32_t bytes)
{
    for (int i = 0; i < count && bytes > 0; i++) {
        if (from >= iov[i].iov_len) {
            from -= (uint32_t)iov[i].iov_len;
            continue;
        }
        uint32_t part = (uint32_t)iov[i].iov_len - from;
        if (part > bytes)
            part = bytes;
        add(c, (uint8_t *)iov[i].iov_base + from, part);
        bytes -= part;
        from = 0;
    }
}

/* Completes the PDU `index` whose header is in heads and whose data segment lies in the batch from
 * data_at on. */
static void close_pdu(struct iscsi_connection *c, uint32_t index, uint32_t head_at,
                      uint32_t data_bytes, bool bare, bool counts)
{
    uint8_t *head = c->heads[index];
    uint32_t head_bytes = ISCSI_BHS;
    head[4] = 0;
    head[5] = (uint8_t)(data_bytes >> 16);
    head[6] = (uint8_t)(data_bytes >> 8);
    head[7] = (uint8_t)data_bytes;
    vrep_be_store_u32(head + 28, c->exp_cmd_sn);
    vrep_be_store_u32(head + 32, iscsi_max_cmd_sn(c));
    if (counts)
        vrep_be_store_u32(head + 24, c->stat_sn++);
    else if (iscsi_opcode(head) != ISCSI_DATA_IN)
        vrep_be_store_u32(head + 24, c->stat_sn);
    if (c->login->header_digest && !bare) {
        vrep_le_store_u32(head + ISCSI_BHS, vrep_crc32c(0, head, ISCSI_BHS));
        head_bytes += 4;
    }
    c->batch[head_at].iov_len = head_bytes;
    if (data_bytes == 0)
        return;
    uint8_t *tail = c->tails[index];
    uint32_t tail_bytes = iscsi_pad(data_bytes);
    memset(tail, 0, ISCSI_TAIL);
    if (c->login->data_digest && !bare) {
        uint32_t crc = 0;
        for (uint32_t i = head_at + 1; i < c->batch_count; i++)
            crc = vrep_crc32c(crc, c->batch[i].iov_base, c->batch[i].iov_len);
        crc = vrep_crc32c(crc, tail, tail_bytes);
        vrep_le_store_u32(tail + tail_bytes, crc);
        tail_bytes += 4;
    }
    if (tail_bytes > 0)
        add(c, tail, tail_bytes);
}

static void make_plain(struct iscsi_connection *c, uint32_t index, const struct iscsi_item *item)
{
    uint32_t at = c->batch_count;
    memcpy(c->heads[index], item->bhs, ISCSI_BHS);
    add(c, c->heads[index], ISCSI_BHS);
    if (item->data_bytes > 0)
        add(c, item->data, item->data_bytes);
    close_pdu(c, index, at, item->data_bytes, item->bare, item->counts);
}

/* What the initiator expected against what the command moved: byte 1's flag, and the difference. */
static uint8_t residual(const struct iscsi_task *task, uint32_t *count)
{
    uint32_t moved = task->direction == ISCSI_WRITE ? task->scsi.data_out : task->scsi.in_bytes;
    if (moved == task->expected) {
        *count = 0;
        return 0;
    }
    *count = moved > task->expected ? moved - task->expected : task->expected - moved;
    return moved > task->expected ? ISCSI_OVERFLOW : ISCSI_UNDERFLOW;
}

static uint32_t data_in_bytes(const struct iscsi_task *task)
{
    if (task->direction != ISCSI_READ)
        return 0;
    return task->scsi.in_bytes < task->expected ? task->scsi.in_bytes : task->expected;
}

static void make_response(struct iscsi_connection *c, uint32_t index, struct iscsi_task *task)
{
    uint8_t *head = c->heads[index], flag;
    uint32_t at = c->batch_count, count;
    memset(head, 0, ISCSI_BHS);
    flag = residual(task, &count);
    head[0] = ISCSI_RESPONSE;
    head[1] = (uint8_t)(ISCSI_FINAL | flag);
    head[3] = task->scsi.status;
    vrep_be_store_u32(head + 16, task->tag);
    vrep_be_store_u32(head + 36, task->in_sn);
    vrep_be_store_u32(head + 44, count);
    add(c, head, ISCSI_BHS);
    uint32_t bytes = 0;
    if (task->scsi.sense_bytes > 0) {
        bytes = 2u + task->scsi.sense_bytes;
        vrep_be_store_u16(task->sense, task->scsi.sense_bytes);
        memcpy(task->sense + 2, task->scsi.sense, task->scsi.sense_bytes);
        add(c, task->sense, bytes);
    }
    close_pdu(c, index, at, bytes, false, true);
}

/* One PDU of a task's answer; true: it was the last. */
static bool make_task(struct iscsi_connection *c, uint32_t index, struct iscsi_task *task)
{
    uint32_t all = data_in_bytes(task);
    if (task->sent == all) {
        make_response(c, index, task);
        return true;
    }
    uint32_t part = all - task->sent;
    if (part > c->login->send_max)
        part = c->login->send_max;
    uint32_t burst = c->login->max_burst - task->sent % c->login->max_burst;
    if (part > burst)
        part = burst;
    bool last = task->sent + part == all;
    bool status = last && task->scsi.status == VREP_SCSI_GOOD;
    uint8_t *head = c->heads[index];
    uint32_t at = c->batch_count, count = 0;
    memset(head, 0, ISCSI_BHS);
    head[0] = ISCSI_DATA_IN;
    if (last || part == burst)
        head[1] |= ISCSI_FINAL;
    if (status)
        head[1] |= (uint8_t)(ISCSI_STATUS | residual(task, &count));
    vrep_be_store_u64(head + 8, task->scsi.lun);
    vrep_be_store_u32(head + 16, task->tag);
    vrep_be_store_u32(head + 20, ISCSI_NO_TAG);
    vrep_be_store_u32(head + 36, task->in_sn++);
    vrep_be_store_u32(head + 40, task->sent);
    vrep_be_store_u32(head + 44, count);
    add(c, head, ISCSI_BHS);
    add_data(c, task->scsi.in, task->scsi.in_count, task->sent, part);
    task->sent += part;
    close_pdu(c, index, at, part, false, status);
    return status;
}

static void make_batch(struct iscsi_connection *c)
{
    uint32_t pdus = 0;
    c->batch_at = c->batch_count = 0;
    while (c->out_first != NULL && room(c, pdus)) {
        struct iscsi_item *item = c->out_first;
        bool whole = true;
        if (item->task != NULL)
            whole = make_task(c, pdus++, item->task);
        else
            make_plain(c, pdus++, item);
        if (!whole)
            continue;
        c->ends = c->ends || item->ends;
        c->out_first = item->next;
        if (c->out_first == NULL)
            c->out_last = NULL;
        item->next = NULL;
        if (c->sent_last != NULL)
            c->sent_last->next = item;
        else
            c->sent_first = item;
        c->sent_last = item;
    }
}

static void batch_sent(struct iscsi_connection *c)
{
    struct iscsi_item *item = c->sent_first, *next;
    c->sent_first = c->sent_last = NULL;
    for (; item != NULL; item = next) {
        next = item->next;
        give_item(c, item);
    }
}

bool iscsi_nothing_to_send(const struct iscsi_connection *c)
{
    return c->out_first == NULL && c->batch_at == c->batch_count;
}

void iscsi_send(struct iscsi_connection *c)
{
    while (c->writable) {
        if (c->batch_at == c->batch_count) {
            batch_sent(c);
            if (c->ends) {
                iscsi_end(c, NULL);
                return;
            }
            make_batch(c);
            if (c->batch_count == 0)
                return;
        }
        struct msghdr message = {.msg_iov = c->batch + c->batch_at,
                                 .msg_iovlen = c->batch_count - c->batch_at};
        ssize_t sent = sendmsg(c->watch.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno == EAGAIN) {
            c->writable = false;
            return;
        }
        if (sent < 0) {
            iscsi_end(c, strerror(errno));
            return;
        }
        size_t left = (size_t)sent;
        while (left > 0) {
            struct iovec *iov = &c->batch[c->batch_at];
            if (iov->iov_len > left) {
                iov->iov_base = (uint8_t *)iov->iov_base + left;
                iov->iov_len -= left;
                break;
            }
            left -= iov->iov_len;
            c->batch_at++;
        }
    }
}
