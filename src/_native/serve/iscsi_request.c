/* Request: PDUs of a connection, one after another, and what they ask for. */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/status.h"
#include "serve/iscsi_internal.h"

static enum handled end(struct iscsi_connection *c, const char *why)
{
    iscsi_end(c, why);
    return ENDED;
}

static enum handled queued(bool good)
{
    return good ? HANDLED : ENDED;
}

/* ---- tasks ----------------------------------------------------------------------- */

static struct iscsi_task **tag_list(struct iscsi_connection *c, uint32_t tag)
{
    return &c->tags[tag % ISCSI_TAG_LISTS];
}

static struct iscsi_task *task_take(struct iscsi_connection *c, uint32_t tag)
{
    struct vrep_iscsi_server *server = c->server;
    struct iscsi_task *task = server->free_task;
    if (task == NULL)
        return NULL;
    server->free_task = task->after;
    server->tasks_free--;
    task->server = server;
    task->connection = c;
    task->before = NULL;
    task->after = c->tasks;
    if (c->tasks != NULL)
        c->tasks->before = task;
    c->tasks = task;
    c->tasks_count++;
    task->tag = tag;
    task->next_tag = *tag_list(c, tag);
    *tag_list(c, tag) = task;
    task->item = (struct iscsi_item){.task = task};
    task->submitted = task->unsolicited = task->solicited = task->broken = false;
    task->received = task->burst_end = task->data_sn = task->r2t_sn = 0;
    task->out_index = 0;
    task->out_within = 0;
    task->sent = task->in_sn = 0;
    return task;
}

static void leave_connection(struct iscsi_task *task)
{
    struct iscsi_connection *c = task->connection;
    if (c == NULL)
        return;
    if (task->before != NULL)
        task->before->after = task->after;
    else
        c->tasks = task->after;
    if (task->after != NULL)
        task->after->before = task->before;
    struct iscsi_task **at = tag_list(c, task->tag);
    while (*at != task)
        at = &(*at)->next_tag;
    *at = task->next_tag;
    task->connection = NULL;
}

void iscsi_task_give(struct iscsi_task *task)
{
    struct vrep_iscsi_server *server = task->server;
    leave_connection(task);
    vrep_scsi_end(&task->scsi);
    task->after = server->free_task;
    server->free_task = task;
    server->tasks_free++;
    server->freed = true;
}

void iscsi_forget_tasks(struct iscsi_connection *c)
{
    while (c->tasks != NULL)
        leave_connection(c->tasks); /* task_done gives them back */
    for (struct iscsi_manage *one = c->managing; one != NULL; one = one->next)
        one->connection = NULL;
    c->managing = NULL;
    c->tasks_count = 0;
}

static void task_done(struct vrep_scsi_task *scsi)
{
    struct iscsi_task *task = (struct iscsi_task *)scsi;
    struct iscsi_connection *c = task->connection;
    task->server->freed = true;
    if (c == NULL) {
        iscsi_task_give(task);
        return;
    }
    c->tasks_count--;
    if (scsi->aborted) {
        iscsi_task_give(task);
        return;
    }
    if (scsi->status != VREP_SCSI_GOOD)
        vrep_count(&c->client.traffic.errors, 1);
    else if (task->direction == ISCSI_READ)
        vrep_count(&c->client.traffic.read_bytes, scsi->in_bytes);
    else if (task->direction == ISCSI_WRITE)
        vrep_count(&c->client.traffic.written_bytes, scsi->out_bytes);
    iscsi_queue(c, &task->item);
}

static struct iscsi_task *find_task(struct iscsi_connection *c, uint32_t tag)
{
    struct iscsi_task *task = *tag_list(c, tag);
    while (task != NULL && task->tag != tag)
        task = task->next_tag;
    return task;
}

/* ---- data-out ----------------------------------------------------------------------- */

/* The next bytes of the task's data-out; what the command has no use for is dropped. */
static void copy_out(struct iscsi_task *task, const uint8_t *data, uint32_t bytes)
{
    uint32_t wanted =
        task->scsi.out_bytes > task->received ? task->scsi.out_bytes - task->received : 0;
    task->received += bytes;
    if (bytes > wanted)
        bytes = wanted;
    while (bytes > 0 && task->out_index < task->scsi.out_count) {
        struct iovec *iov = &task->scsi.out[task->out_index];
        size_t part = iov->iov_len - task->out_within;
        if (part > bytes)
            part = bytes;
        memcpy((uint8_t *)iov->iov_base + task->out_within, data, part);
        data += part;
        bytes -= (uint32_t)part;
        task->out_within += part;
        if (task->out_within == iov->iov_len) {
            task->out_index++;
            task->out_within = 0;
        }
    }
}

static bool ask_for_data(struct iscsi_connection *c, struct iscsi_task *task)
{
    uint8_t bhs[ISCSI_BHS] = {ISCSI_R2T, ISCSI_FINAL};
    struct vrep_iscsi_server *server = c->server;
    uint32_t bytes = task->scsi.out_bytes - task->received;
    if (bytes > c->login->max_burst)
        bytes = c->login->max_burst;
    if (++server->transfer_tag == ISCSI_NO_TAG)
        server->transfer_tag = 1;
    task->solicited = true;
    task->transfer_tag = server->transfer_tag;
    task->data_sn = 0;
    task->burst_end = task->received + bytes;
    vrep_be_store_u64(bhs + 8, task->scsi.lun);
    vrep_be_store_u32(bhs + 16, task->tag);
    vrep_be_store_u32(bhs + 20, task->transfer_tag);
    vrep_be_store_u32(bhs + 36, task->r2t_sn++);
    vrep_be_store_u32(bhs + 40, task->received);
    vrep_be_store_u32(bhs + 44, bytes);
    return iscsi_queue_pdu(c, bhs, NULL, 0, false);
}

/* Submits a task that has its data, or asks for more. */
static enum handled go_on(struct iscsi_connection *c, struct iscsi_task *task)
{
    if (task->unsolicited)
        return HANDLED; /* more comes by itself */
    if (task->received < task->scsi.out_bytes)
        return queued(ask_for_data(c, task));
    task->submitted = true;
    vrep_scsi_submit(&task->scsi);
    return c->state == ISCSI_FREE ? ENDED : HANDLED;
}

/* RFC 7143 7.9: data that were lost end the task, with the sense that it names. */
static void answer_broken(struct iscsi_connection *c, struct iscsi_task *task)
{
    const struct vrep_sense sense = {.code = 0x0b4705}; /* PROTOCOL SERVICE CRC ERROR */
    vrep_scsi_end(&task->scsi); /* it was never submitted: nothing of it is done */
    task->submitted = true;
    task->scsi.status = VREP_SCSI_CHECK_CONDITION;
    task->scsi.sense_bytes = (uint8_t)vrep_sense_encode(&sense, false, task->scsi.sense);
    task->scsi.in_bytes = 0;
    c->tasks_count--;
    vrep_count(&c->client.traffic.errors, 1);
    iscsi_queue(c, &task->item);
}

static enum handled data_out(struct iscsi_connection *c, const struct iscsi_pdu *pdu)
{
    const uint8_t *bhs = pdu->bhs;
    struct iscsi_task *task = find_task(c, vrep_be_load_u32(bhs + 16));
    if (task == NULL || task->submitted)
        return HANDLED; /* of a task that was aborted */
    uint32_t tag = vrep_be_load_u32(bhs + 20), offset = vrep_be_load_u32(bhs + 40);
    bool last = (bhs[1] & ISCSI_FINAL) != 0;
    if (task->solicited ? tag != task->transfer_tag : tag != ISCSI_NO_TAG || !task->unsolicited)
        return end(c, "sent data that nobody asked for");
    if (vrep_be_load_u32(bhs + 36) != task->data_sn || offset != task->received)
        task->broken = true;
    if (task->broken) {
        if (last)
            answer_broken(c, task);
        return HANDLED;
    }
    if (pdu->data_bytes > task->burst_end - task->received)
        return end(c, "sent more data than was asked for");
    task->data_sn++;
    copy_out(task, pdu->data, pdu->data_bytes);
    if (!last)
        return HANDLED;
    if (task->solicited && task->received != task->burst_end)
        return end(c, "sent less data than was asked for");
    task->solicited = task->unsolicited = false;
    return go_on(c, task);
}

/* ---- SCSI command ------------------------------------------------------------------------ */

static uint8_t attribute(uint8_t flags)
{
    static const uint8_t attributes[8] = {
        VREP_SCSI_SIMPLE, VREP_SCSI_SIMPLE, VREP_SCSI_ORDERED, VREP_SCSI_HEAD_OF_QUEUE,
        VREP_SCSI_ACA,    VREP_SCSI_ACA,    VREP_SCSI_ACA,     VREP_SCSI_ACA};
    return attributes[flags & 7u];
}

static bool unprepared(struct iscsi_connection *c, struct iscsi_task *task)
{
    struct vrep_iscsi_server *server = c->server;
    c->tasks_count--;
    leave_connection(task); /* frees nothing that another could wait for */
    task->after = server->free_task;
    server->free_task = task;
    server->tasks_free++;
    return false;
}

/* False: no room now, nothing was taken. */
static bool begin(struct iscsi_connection *c, const uint8_t *bhs, struct iscsi_task **out)
{
    struct iscsi_task *task = task_take(c, vrep_be_load_u32(bhs + 16));
    if (task == NULL)
        return false;
    task->expected = vrep_be_load_u32(bhs + 20);
    task->direction = bhs[1] & (ISCSI_READ | ISCSI_WRITE);
    memset(&task->scsi, 0, offsetof(struct vrep_scsi_task, out));
    task->scsi.nexus = c->nexus;
    task->scsi.lun = vrep_be_load_u64(bhs + 8);
    memcpy(task->scsi.cdb, bhs + 32, VREP_SCSI_CDB_BYTES);
    task->scsi.attribute = attribute(bhs[1]);
    task->scsi.out_expected = task->direction == ISCSI_WRITE ? task->expected : 0;
    task->scsi.done = task_done;
    if (vrep_scsi_prepare(&task->scsi) == VREP_E_AGAIN)
        return unprepared(c, task);
    *out = task;
    return true;
}

/* Whether data of its own tasks come behind the command that finds no room: then to wait for room
 * would be to wait for ever. */
static bool awaits_data(const struct iscsi_connection *c)
{
    for (const struct iscsi_task *task = c->tasks; task != NULL; task = task->after)
        if (!task->submitted)
            return true;
    return false;
}

/* The initiator sends it again later (SAM-5 5.3.1). */
static enum handled answer_full(struct iscsi_connection *c, const uint8_t *request)
{
    uint8_t bhs[ISCSI_BHS] = {ISCSI_RESPONSE, ISCSI_FINAL, 0, VREP_SCSI_TASK_SET_FULL};
    uint32_t expected = vrep_be_load_u32(request + 20);
    memcpy(bhs + 16, request + 16, 4);
    if ((request[1] & (ISCSI_READ | ISCSI_WRITE)) != 0 && expected > 0) {
        bhs[1] |= ISCSI_UNDERFLOW;
        vrep_be_store_u32(bhs + 44, expected);
    }
    vrep_count(&c->server->stats.stalls, 1);
    return queued(iscsi_queue_pdu(c, bhs, NULL, 0, true));
}

static enum handled scsi_command(struct iscsi_connection *c, const struct iscsi_pdu *pdu)
{
    const uint8_t *bhs = pdu->bhs;
    const struct iscsi_login *agreed = c->login;
    bool last = (bhs[1] & ISCSI_FINAL) != 0, writes = (bhs[1] & ISCSI_WRITE) != 0;
    uint32_t expected = vrep_be_load_u32(bhs + 20);
    struct iscsi_task *task;
    if (writes && (bhs[1] & ISCSI_READ) != 0)
        return end(c, "asked for both directions at once");
    if (pdu->data_bytes > 0 &&
        (!writes || !agreed->immediate_data || pdu->data_bytes > agreed->first_burst ||
         pdu->data_bytes > expected))
        return end(c, "sent more immediate data than was agreed");
    if (!last && (!writes || agreed->initial_r2t))
        return end(c, "announced data that were not agreed");
    if (find_task(c, vrep_be_load_u32(bhs + 16)) != NULL)
        return end(c, "used the tag of a task again");
    if (!begin(c, bhs, &task))
        return awaits_data(c) ? answer_full(c, bhs) : STALLED;
    task->unsolicited = !last;
    task->burst_end = expected < agreed->first_burst ? expected : agreed->first_burst;
    copy_out(task, pdu->data, pdu->data_bytes);
    return go_on(c, task);
}

/* ---- task management -------------------------------------------------------------------- */

static void answer_management(struct iscsi_connection *c, uint32_t tag, uint8_t response)
{
    uint8_t bhs[ISCSI_BHS] = {ISCSI_TASK_MANAGEMENT_RESPONSE, ISCSI_FINAL, response};
    vrep_be_store_u32(bhs + 16, tag);
    (void)iscsi_queue_pdu(c, bhs, NULL, 0, true);
}

static void managed(struct vrep_scsi_management *scsi)
{
    static const uint8_t responses[] = {
        [VREP_SCSI_COMPLETE] = 0, [VREP_SCSI_NO_LUN] = 2, [VREP_SCSI_REJECTED] = 255};
    struct iscsi_manage *one = (struct iscsi_manage *)scsi;
    struct iscsi_connection *c = one->connection;
    one->server->managing--;
    if (c != NULL) {
        struct iscsi_manage **at = &c->managing;
        while (*at != one)
            at = &(*at)->next;
        *at = one->next;
        answer_management(c, one->tag, responses[scsi->response]);
        if (one->cold && c->out_last != NULL)
            c->out_last->ends = true;
    }
    free(one);
}

static enum handled task_management(struct iscsi_connection *c, const struct iscsi_pdu *pdu)
{
    static const uint8_t functions[] = {
        [1] = VREP_SCSI_ABORT_TASK, [2] = VREP_SCSI_ABORT_TASK_SET, [4] = VREP_SCSI_CLEAR_TASK_SET,
        [5] = VREP_SCSI_UNIT_RESET, [6] = VREP_SCSI_TARGET_RESET,   [7] = VREP_SCSI_TARGET_RESET};
    const uint8_t *bhs = pdu->bhs;
    uint8_t function = bhs[1] & 0x7fu;
    uint32_t tag = vrep_be_load_u32(bhs + 16);
    struct iscsi_task *task = NULL;
    if (function == 1) {
        task = find_task(c, vrep_be_load_u32(bhs + 20));
        /* One whose answer waits to be sent is done: to say that it was aborted would be a lie. */
        if (task == NULL || (task->submitted && !vrep_scsi_task_live(&task->scsi))) {
            answer_management(c, tag, 1); /* no such task */
            return HANDLED;
        }
    }
    if (function == 0 || function == 3 || function > 7) {
        answer_management(c, tag, function == 8 ? 4 : 5); /* no reassignment; not supported */
        return HANDLED;
    }
    struct iscsi_manage *one = calloc(1, sizeof *one);
    if (one == NULL)
        return end(c, vrep_status_text(VREP_E_NOMEM));
    one->connection = c;
    one->server = c->server;
    one->tag = tag;
    one->cold = function == 7;
    one->next = c->managing;
    c->managing = one;
    c->server->managing++;
    one->scsi.nexus = c->nexus;
    one->scsi.lun = vrep_be_load_u64(bhs + 8);
    one->scsi.function = functions[function];
    one->scsi.task = task != NULL ? &task->scsi : NULL;
    one->scsi.done = managed;
    vrep_scsi_manage(&one->scsi);
    return c->state == ISCSI_FREE ? ENDED : HANDLED;
}

/* ---- all of them ------------------------------------------------------------------- */

/* Whether a PDU is due now: requests come in the order of their numbers; false: it is dropped. */
static bool in_order(struct iscsi_connection *c, const uint8_t *bhs, bool *hole)
{
    *hole = false;
    if (iscsi_opcode(bhs) == ISCSI_DATA_OUT || (bhs[0] & ISCSI_IMMEDIATE) != 0)
        return true;
    uint32_t ahead = vrep_be_load_u32(bhs + 24) - c->exp_cmd_sn;
    if (ahead > iscsi_max_cmd_sn(c) - c->exp_cmd_sn || iscsi_max_cmd_sn(c) + 1 == c->exp_cmd_sn)
        return false;   /* out of the window: RFC 7143 4.2.2.1 */
    *hole = ahead != 0; /* one connection brings them in order, or never */
    return true;
}

static enum handled request(struct iscsi_connection *c, const struct iscsi_pdu *pdu)
{
    const uint8_t *bhs = pdu->bhs;
    uint8_t opcode = iscsi_opcode(bhs);
    bool hole;
    if (!in_order(c, bhs, &hole))
        return HANDLED;
    if (hole)
        return end(c, "left out a command number");
    bool numbered = opcode != ISCSI_DATA_OUT && (bhs[0] & ISCSI_IMMEDIATE) == 0;
    /* The number is taken first, so that what is answered at once opens the window; and given back
     * when the request has to wait. */
    if (numbered)
        c->exp_cmd_sn++;
    enum handled handled;
    if (c->nexus == NULL &&
        (opcode == ISCSI_COMMAND || opcode == ISCSI_TASK_MANAGEMENT || opcode == ISCSI_DATA_OUT)) {
        handled = iscsi_reject(c, pdu, ISCSI_REJECT_PROTOCOL); /* discovery */
    } else {
        switch (opcode) {
        case ISCSI_COMMAND:
            handled = scsi_command(c, pdu);
            break;
        case ISCSI_DATA_OUT:
            handled = data_out(c, pdu);
            break;
        case ISCSI_TASK_MANAGEMENT:
            handled = task_management(c, pdu);
            break;
        case ISCSI_NOP_OUT:
            handled = iscsi_nop_out(c, pdu);
            break;
        case ISCSI_TEXT:
            handled = iscsi_text_request(c, pdu);
            break;
        case ISCSI_LOGOUT:
            handled = iscsi_logout(c, pdu);
            break;
        default:
            handled = iscsi_reject(
                c, pdu, opcode == ISCSI_SNACK ? ISCSI_REJECT_COMMAND : ISCSI_REJECT_PROTOCOL);
        }
    }
    if (numbered && handled == STALLED)
        c->exp_cmd_sn--;
    return handled;
}

bool iscsi_consume(struct iscsi_connection *c)
{
    for (;;) {
        struct iscsi_pdu pdu;
        if (c->state != ISCSI_LOGGING_IN && c->state != ISCSI_SERVING)
            return c->state != ISCSI_FREE;
        if (c->queued >= ISCSI_QUEUE_MAX) { /* it asks, and does not read what is answered */
            c->stalled = true;
            return true;
        }
        bool serving = c->state == ISCSI_SERVING;
        enum iscsi_found found = iscsi_pdu_find(c->in + c->in_from, c->in_to - c->in_from,
                                                serving && c->login->header_digest,
                                                serving && c->login->data_digest, &pdu);
        if (found == ISCSI_BROKEN) {
            iscsi_end(c, "sent a PDU that is damaged, or too long");
            return false;
        }
        if (found == ISCSI_MORE)
            return true;
        enum handled handled = serving ? request(c, &pdu) : iscsi_login_request(c, &pdu);
        if (handled == ENDED)
            return false;
        if (handled == STALLED) {
            c->stalled = true;
            vrep_count(&c->server->stats.stalls, 1);
            return true;
        }
        c->in_from += pdu.bytes;
        c->server->received++;
        vrep_count(&c->client.traffic.requests, 1);
    }
}
